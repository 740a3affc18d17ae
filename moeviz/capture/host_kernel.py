# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call,call-overload,assignment,call-arg"
"""The sums of layers' decisions on a CPU, in one compiled pass each: half the time of whole tables, or less.

Compiling takes some seconds once per machine (numba keeps the result); `host_sums` says when. A tile of tokens at a
time lies in the first cache, experts as rows and tokens as columns, so that each sum over experts is one over columns
side by side and a register holds 4 to 16 tokens.

The tables come by their addresses: to make an array of each costs a microsecond, a tenth of the time that its sums
take. So the caller vouches for shapes, types and that the tables live on.

Shapes: T tokens, E experts, K of a token, C columns of a tile, N layers. All numbers are float32 but for the sums
returned.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from numpy.polynomial import Chebyshev, Polynomial

COLUMNS = 64
"""Tokens of a tile: with 64 experts it takes 16 KB."""
_TILES = 64
"""Tiles whose probabilities are added up in float32, before they go to a sum in float64."""
_ONE, _HALF, _ZERO = np.float32(1), np.float32(0.5), np.float32(0)
_LN2, _LOG2_E = np.float32(math.log(2)), np.float32(1 / math.log(2))
_LIMIT = np.float32(126)
"""2 to the power of it and of its negative are normal numbers, and so is the sum of a few such small ones."""
_LARGE = np.float32(2.0**100)
"""Sums of exponentials beyond it, or below its inverse, are made once more around the largest logit."""
_EXP2 = tuple(
    np.float32(c)
    for c in Chebyshev.interpolate(lambda x: 2.0**x, 6, domain=[-0.5, 0.5]).convert(kind=Polynomial).coef
)
"""Coefficients of 2^f for |f| <= 1/2, to 1e-8 of it."""
_LOG2 = tuple(np.float32(2 / math.log(2) / (2 * i + 1)) for i in range(5))
"""log2((1 + t) / (1 - t)) = 2 / ln 2 * (t + t^3 / 3 + ...), |t| <= 0.172: to 1e-9."""
_SQRT_HALF_BITS, _MANTISSA_BITS, _EXPONENT_BIAS = np.int32(0x3F3504F3), np.int32(23), np.int32(127)
_TURNS = 4
"""Partial sums of an expert's weights."""
_SQUARE = 8
"""Rows and columns that are transposed at once, in registers."""
_OPTIONS = {
    "nogil": True,
    "error_model": "numpy",
    # Order and fusing of operations are free; not-a-number and infinity are not assumed away.
    "fastmath": {"contract", "reassoc", "nsz", "arcp"},
}


@njit(**_OPTIONS)
def _exp2(x):
    x = -_LIMIT if x < -_LIMIT else x
    x = _LIMIT if x > _LIMIT else x
    whole = np.floor(x + _HALF)
    f = x - whole
    power = _EXP2[5] + f * _EXP2[6]
    power = _EXP2[0] + f * (_EXP2[1] + f * (_EXP2[2] + f * (_EXP2[3] + f * (_EXP2[4] + f * power))))
    return power * np.int32(np.int32(np.int32(whole) + _EXPONENT_BIAS) << _MANTISSA_BITS).view(np.float32)


@njit(**_OPTIONS)
def _log2(x):
    bits = np.float32(x).view(np.int32)
    exponent = np.int32(np.int32(bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS)
    mantissa = np.int32(bits - np.int32(exponent << _MANTISSA_BITS)).view(np.float32)
    t = (mantissa - _ONE) / (mantissa + _ONE)
    q = t * t
    series = _LOG2[0] + q * (_LOG2[1] + q * (_LOG2[2] + q * (_LOG2[3] + q * _LOG2[4])))
    return np.float32(exponent) + t * series + x * _ZERO  # what is no finite number has no logarithm


@njit(**_OPTIONS)
def _fill(values_C, value):
    for c in range(values_C.size):
        values_C[c] = value


@njit(**_OPTIONS)
def _fill_table(table_EC, value):
    for e in range(table_EC.shape[0]):
        for c in range(table_EC.shape[1]):
            table_EC[e, c] = value


@njit(**_OPTIONS)
def _largest(table_EC, top_C):
    """Four rows at a time: the largest so far goes through memory once for each four."""
    num_experts, columns = table_EC.shape
    for c in range(columns):
        top_C[c] = table_EC[0, c]
    e = 1
    while e + 3 < num_experts:
        for c in range(columns):
            a = table_EC[e, c] if table_EC[e, c] > table_EC[e + 1, c] else table_EC[e + 1, c]
            b = table_EC[e + 2, c] if table_EC[e + 2, c] > table_EC[e + 3, c] else table_EC[e + 3, c]
            a = a if a > b else b
            top_C[c] = a if a > top_C[c] else top_C[c]
        e += 4
    while e < num_experts:
        for c in range(columns):
            top_C[c] = table_EC[e, c] if table_EC[e, c] > top_C[c] else top_C[c]
        e += 1


@njit(**_OPTIONS)
def _squares(logits_EC, live_C):
    total = 0.0
    for e in range(logits_EC.shape[0]):
        row = _ZERO
        for c in range(logits_EC.shape[1]):
            row += logits_EC[e, c] * logits_EC[e, c] * live_C[c]
        total += row
    return total / logits_EC.shape[0]


@njit(**_OPTIONS)
def _softmax(table_EC, shift_C, total_C, log_C):
    """e^(z - shift) in place of z; its sum, and that of it times its logarithm."""
    for c in range(table_EC.shape[1]):
        total_C[c] = _ZERO
        log_C[c] = _ZERO
    for e in range(table_EC.shape[0]):
        for c in range(table_EC.shape[1]):
            z = table_EC[e, c] - shift_C[c]
            score = _exp2(z * _LOG2_E)
            table_EC[e, c] = score
            total_C[c] += score
            log_C[c] += score * z


@njit(**_OPTIONS)
def _sigmoid(table_EC, total_exp_C, total_C, log_C, top_C):
    """s = e^z / (1 + e^z) in place of z; the sums of e^z, s and s ln s, and the largest s."""
    for c in range(table_EC.shape[1]):
        total_exp_C[c] = _ZERO
        total_C[c] = _ZERO
        log_C[c] = _ZERO
        top_C[c] = _ZERO
    for e in range(table_EC.shape[0]):
        for c in range(table_EC.shape[1]):
            z = table_EC[e, c]
            exponential = _exp2(z * _LOG2_E)
            one_more = _ONE + exponential
            score = exponential / one_more
            part = _LN2 * _log2(one_more if z < _ZERO else score)
            log = z - part if z < _ZERO else part
            table_EC[e, c] = score
            total_exp_C[c] += exponential
            total_C[c] += score
            log_C[c] += score * log
            top_C[c] = score if score > top_C[c] else top_C[c]


@njit(**_OPTIONS)
def _far_from_zero(logits_TE, start, live_C, shift_C, total_exp_C):
    """Exponentials of a tile around its largest logits, where those around 0 may have left the range of numbers."""
    near = 0
    for c in range(total_exp_C.size):
        near += total_exp_C[c] < _LARGE and total_exp_C[c] > _ONE / _LARGE
    if near == total_exp_C.size:
        return
    for c in range(min(total_exp_C.size, logits_TE.shape[0] - start)):
        if live_C[c] > _ZERO:
            shift_C[c] = logits_TE[start + c, 0]
            for e in range(logits_TE.shape[1]):
                if logits_TE[start + c, e] > shift_C[c]:
                    shift_C[c] = logits_TE[start + c, e]
            total_exp_C[c] = _ZERO
            for e in range(logits_TE.shape[1]):
                total_exp_C[c] += math.exp(logits_TE[start + c, e] - shift_C[c])


@njit(**_OPTIONS)
def _scale(table_EC, factor_C):
    for e in range(table_EC.shape[0]):
        for c in range(table_EC.shape[1]):
            table_EC[e, c] *= factor_C[c]


@njit(**_OPTIONS)
def _add_scaled(table_EC, factor_C, sum_EC):
    for e in range(table_EC.shape[0]):
        for c in range(table_EC.shape[1]):
            sum_EC[e, c] += table_EC[e, c] * factor_C[c]


@njit(**_OPTIONS)
def _add_bias(table_EC, bias_E):
    for e in range(table_EC.shape[0]):
        for c in range(table_EC.shape[1]):
            table_EC[e, c] += bias_E[e]


@njit(**_OPTIONS)
def _take_chosen(table_EC, ids_TK, start, lowest_C):
    """The lowest chosen score of each token; chosen ones become minus infinity."""
    for c in range(min(table_EC.shape[1], ids_TK.shape[0] - start)):
        lowest = np.float32(np.inf)
        for k in range(ids_TK.shape[1]):
            expert = np.uintp(ids_TK[start + c, k])  # no index counts from the end: a look less for each
            score = table_EC[expert, c]
            lowest = lowest if score > lowest else score
            table_EC[expert, c] = -np.inf
        lowest_C[c] = lowest


@njit(**_OPTIONS)
def _add_tokens(live_C, top_C, total_C, log_C, shift_C, total_exp_C, margin_C, sums_N):
    """Rows as in `reduce.TOKEN_SUMS`."""
    entropy = lse_squared = confidence = margin = _ZERO
    for c in range(live_C.size):
        each = _ONE / total_C[c]
        lse = shift_C[c] + _LN2 * _log2(total_exp_C[c])
        entropy += live_C[c] * (_LN2 * _log2(total_C[c]) - log_C[c] * each)
        lse_squared += live_C[c] * (lse * lse)
        confidence += live_C[c] * (top_C[c] * each)
    for c in range(live_C.size):
        margin += live_C[c] * margin_C[c]
    sums_N[0] += entropy
    sums_N[1] += lse_squared
    sums_N[2] += confidence
    sums_N[4] += margin


@njit(**_OPTIONS)
def _empty(sum_EC, into_E):
    for e in range(sum_EC.shape[0]):
        total = _ZERO
        for c in range(sum_EC.shape[1]):
            total += sum_EC[e, c]
        for c in range(sum_EC.shape[1]):
            sum_EC[e, c] = _ZERO
        into_E[e] += total


@njit(**_OPTIONS)
def _add_slots(ids_TK, weights_TK, valid_T, dropped_TK, unused_TK, counted, counts_XE, weight_sum_E):
    """False, and nothing added, when an id is no expert."""
    num_experts, ids_S, weights_S = counts_XE.shape[1], ids_TK.reshape(-1), weights_TK.reshape(-1)
    outside = 0
    for slot in range(ids_S.size):
        outside |= ids_S[slot] | (num_experts - 1 - ids_S[slot])  # negative if one of both is
    if outside < 0:
        return False
    if not (counted or valid_T.size or dropped_TK.size or unused_TK.size):
        # Sums in turns: one waits for the one before it where that went to the same expert.
        parts_XE = np.zeros((_TURNS, num_experts))
        for slot in range(ids_S.size):
            parts_XE[slot % _TURNS, np.uintp(ids_S[slot])] += weights_S[slot]
        for x in range(_TURNS):
            for e in range(num_experts):
                weight_sum_E[e] += parts_XE[x, e]
    else:
        for t in range(ids_TK.shape[0]):
            if valid_T.size and not valid_T[t]:
                continue
            for k in range(ids_TK.shape[1]):
                expert = ids_TK[t, k]
                weight_sum_E[expert] += weights_TK[t, k]
                if unused_TK.size and unused_TK[t, k]:
                    continue
                counts_XE[0, expert] += 1
                counts_XE[1, expert] += not (dropped_TK.size and dropped_TK[t, k])
    return True


@intrinsic
def _transpose_square(typing_context, source, source_row, target, target_row):
    """8 x 8 floats at one address, transposed to another; rows are so many bytes apart.

    A row is a register: neighbours are zipped float by float, then pair by pair, and then halves change places.
    """

    def generate(context, builder, signature, arguments):
        source, source_row, target, target_row = arguments
        address, register = ir.IntType(64), ir.VectorType(ir.FloatType(), _SQUARE)

        def at(start, row_bytes, row):
            place = builder.add(start, builder.mul(row_bytes, ir.Constant(address, row)))
            return builder.inttoptr(place, register.as_pointer())

        def mixed(a, b, order):
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), _SQUARE), order))

        rows = [builder.load(at(source, source_row, row), align=4) for row in range(_SQUARE)]
        low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
        zipped = [mixed(rows[i], rows[i + 1], order) for i in (0, 2, 4, 6) for order in (low, high)]
        low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
        of_four = [
            mixed(zipped[i], zipped[i + 2], order) for i in (0, 1, 4, 5) for order in (low, high)
        ]  # column j and j + 4 of rows 0 to 3, then of rows 4 to 7
        low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        columns = [mixed(of_four[j], of_four[j + 4], order) for order in (low, high) for j in range(4)]
        for row, column in enumerate(columns):
            builder.store(column, at(target, target_row, row), align=4)
        return context.get_dummy_value()

    return types.none(*[types.int64] * 4), generate


@njit(**_OPTIONS)
def _load(logits_TE, start, rows, valid_T, table_EC):
    """Logits of a tile's tokens, transposed; where all columns are tokens, in squares as far as these go."""
    num_experts, columns = table_EC.shape
    squared = num_experts // _SQUARE * _SQUARE if rows == columns and not valid_T.size else 0
    source, target = np.int64(logits_TE.ctypes.data), np.int64(table_EC.ctypes.data)
    source_row, target_row = np.int64(4 * num_experts), np.int64(4 * columns)
    for c in range(0, columns if squared else 0, _SQUARE):
        token = source + (start + c) * source_row
        for e in range(0, squared, _SQUARE):
            _transpose_square(token + 4 * e, source_row, target + e * target_row + 4 * c, target_row)
    if squared < num_experts:
        for c in range(rows):
            if not valid_T.size or valid_T[start + c]:
                for e in range(squared, num_experts):
                    table_EC[e, c] = logits_TE[start + c, e]


def _array(dtype: types.Type, ndim: int) -> types.Array:
    return types.Array(dtype, ndim, "C")


@njit(**_OPTIONS)
def _sum_layer(
    logits_TE,
    ids_TK,
    weights_TK,
    valid_T,
    dropped_TK,
    unused_TK,
    bias_E,
    sigmoid,
    biased,
    ranked,
    squares,
    counted,
    counts_XE,
    sums_XE,
    tokens_R,
):
    """Add one layer's decisions; see `sum_layers`. Options are without elements where there are none."""
    num_tokens, num_experts = logits_TE.shape
    if not _add_slots(ids_TK, weights_TK, valid_T, dropped_TK, unused_TK, counted, counts_XE, sums_XE[1]):
        return False
    table_EC = np.empty((num_experts, COLUMNS), np.float32)
    prob_sum_EC = np.empty((num_experts, COLUMNS), np.float32)
    # Rows of one table would do, but are taken for memory that may overlap, and worked on number by number.
    top_C, total_C, log_C = (
        np.empty(COLUMNS, np.float32),
        np.empty(COLUMNS, np.float32),
        np.empty(COLUMNS, np.float32),
    )
    shift_C, total_exp_C = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    margin_C, lowest_C = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    factor_C, live_C = np.empty(COLUMNS, np.float32), np.empty(COLUMNS, np.float32)
    _fill_table(prob_sum_EC, _ZERO)
    _fill(margin_C, _ZERO)
    _fill(lowest_C, _ZERO)
    for tile in range((num_tokens + COLUMNS - 1) // COLUMNS):
        start = tile * COLUMNS
        rows = min(COLUMNS, num_tokens - start)
        if rows < COLUMNS or valid_T.size:
            _fill_table(table_EC, _ZERO)  # what a padded token holds may be no number
            _fill(live_C, _ZERO)
        for c in range(rows):
            if not valid_T.size or valid_T[start + c]:
                live_C[c] = _ONE
        _load(logits_TE, start, rows, valid_T, table_EC)
        if squares:
            tokens_R[3] += _squares(table_EC, live_C)
        if sigmoid:
            _fill(shift_C, _ZERO)
            _sigmoid(table_EC, total_exp_C, total_C, log_C, top_C)
            _far_from_zero(logits_TE, start, live_C, shift_C, total_exp_C)
            for c in range(COLUMNS):
                factor_C[c] = live_C[c] / total_C[c]
            _add_scaled(table_EC, factor_C, prob_sum_EC)
        else:
            _largest(table_EC, shift_C)
            _softmax(table_EC, shift_C, total_C, log_C)
            _fill(top_C, _ONE)
            for c in range(COLUMNS):
                total_exp_C[c] = total_C[c]
                factor_C[c] = _ONE / total_C[c]
            _scale(table_EC, factor_C)
            _add_scaled(table_EC, live_C, prob_sum_EC)
        if ranked:
            if biased:
                _add_bias(table_EC, bias_E)
            _take_chosen(table_EC, ids_TK, start, lowest_C)
            _largest(table_EC, margin_C)
            for c in range(COLUMNS):
                margin_C[c] = lowest_C[c] - margin_C[c]
        _add_tokens(live_C, top_C, total_C, log_C, shift_C, total_exp_C, margin_C, tokens_R)
        if (tile + 1) % _TILES == 0:
            _empty(prob_sum_EC, sums_XE[0])
    _empty(prob_sum_EC, sums_XE[0])
    return True


def _pointer_to(element: types.Type):
    @intrinsic
    def pointer(typing_context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


_float32_at, _int64_at, _bool_at = (_pointer_to(each) for each in (types.float32, types.int64, types.boolean))


SIGNATURE = types.boolean(
    _array(types.int64, 2),
    *[types.intp] * 3,
    _array(types.boolean, 1),
    *[types.boolean] * 2,
    _array(types.float32, 2),
    *[types.boolean] * 5,
    _array(types.int64, 3),
    _array(types.float64, 3),
    _array(types.float64, 2),
)


@njit(cache=True, **_OPTIONS)
def sum_layers(
    tables_NA,
    num_tokens,
    num_experts,
    top_k,
    valid_T,
    drops,
    unused,
    bias_NE,
    sigmoid,
    biased,
    ranked,
    squares,
    counted,
    counts_NXE,
    sums_NXE,
    tokens_NR,
):
    """Add the decisions of layers to the sums.

    Args:
        tables_NA: addresses of a layer's logits [T, E], gate weights [T, K], expert ids [T, K] (int64), and of
            `dropped_TK` and `unused_TK`, as in `Reading`; all without gaps.
        num_tokens, num_experts, top_k: T, E, K.
        valid_T: as in `Reading`; without elements: all are.
        drops, unused: whether there are such tables.
        bias_NE: selection biases, read if `biased`.
        sigmoid: scores by sigmoid; else softmax.
        biased: whether there is a bias.
        ranked: sum the margin of the selection.
        squares: sum the squared logits.
        counted: count slots.
        counts_NXE: before any drop, and kept.
        sums_NXE: probabilities, and gate weights.
        tokens_NR: rows as in `reduce.TOKEN_SUMS`.

    Returns:
        False if an id is no expert: then the sums are worth nothing.
    """
    table, slots = (num_tokens, num_experts), (num_tokens, top_k)
    dropped, not_used = (num_tokens if drops else 0, top_k), (num_tokens if unused else 0, top_k)
    for n in range(tables_NA.shape[0]):
        if not _sum_layer(
            carray(_float32_at(tables_NA[n, 0]), table),
            carray(_int64_at(tables_NA[n, 2]), slots),
            carray(_float32_at(tables_NA[n, 1]), slots),
            valid_T,
            carray(_bool_at(tables_NA[n, 3]), dropped),
            carray(_bool_at(tables_NA[n, 4]), not_used),
            bias_NE[n if biased else 0],
            sigmoid,
            biased,
            ranked,
            squares,
            counted,
            counts_NXE[n],
            sums_NXE[n],
            tokens_NR[n],
        ):
            return False
    return True


def is_kept() -> bool:
    """Whether an earlier process has compiled it, so that having it takes a fraction of a second."""
    return any(Path(sum_layers.stats.cache_path).glob("host_kernel.sum_layers-*.nbi"))
