"""The sentences of `parallel`: one frame, four grammars, in the order Spanish, French, German, Russian.

`{S}` and `{S2}` are people, `{O}` and `{O2}` things, `{F}` food, `{P}` a place; `{T}` says when; `{V}`, `{C}`, `{M}`
are what somebody did, did together, or felt; `{Q}` is a quality, `{N}` a number, `{R}` a reason, `{W}` a wish.
"""

from __future__ import annotations

Frame = tuple[str, str, str, str]

BEGINNINGS: tuple[Frame, ...] = (
    (
        "{T} {S:nom} {V} {O:acc} {P:in}.",
        "{T}, {S:nom} {V} {O:acc} {P:in}.",
        "{T} {V} {S:nom} {O:acc} {P:in}.",
        "{T} {S:nom} {V} {O:acc} {P:in}.",
    ),
    (
        "{T} {S:nom} fue {P:to}.",
        "{T}, {S:nom} est {S:?allé/allée} {P:to}.",
        "{T} ging {S:nom} {P:to}.",
        "{T} {S:nom} {S:?пошёл/пошла} {P:to}.",
    ),
    (
        "{T} {S:nom} {C} con {S2:nom}.",
        "{T}, {S:nom} {C} avec {S2:nom}.",
        "{T} {C} {S:nom} mit {S2:dat}.",
        "{T} {S:nom} {C} {S2:with}.",
    ),
)
"""Sentences that begin with a time."""

MIDDLES: tuple[Frame, ...] = (
    (
        "{S:^nom} le dio {O:acc} {S2:dat}.",
        "{S:^nom} a donné {O:acc} {S2:dat}.",
        "{S:^nom} gab {S2:dat} {O:acc}.",
        "{S:^nom} {S:?дал/дала} {S2:dat} {O:acc}.",
    ),
    (
        "{O:^nom} era {Q}.",
        "{O:^nom} était {Q}.",
        "{O:^nom} war {Q}.",
        "{O:^nom} {O:?был/была/было} {Q}.",
    ),
    (
        "{S:^nom} {M}.",
        "{S:^nom} {M}.",
        "{S:^nom} {M}.",
        "{S:^nom} {M}.",
    ),
    (
        "«¿Dónde está {O:nom}?», preguntó {S:nom}. «{P:^in}», respondió {S2:nom}.",
        "« Où est {O:nom} ? » a demandé {S:nom}. « {P:^in} », a répondu {S2:nom}.",
        "„Wo ist {O:nom}?“, fragte {S:nom}. „{P:^in}“, antwortete {S2:nom}.",
        "«Где {O:nom}?» — {S:?спросил/спросила} {S:nom}. «{P:^in}», — {S2:?ответил/ответила} {S2:nom}.",
    ),
    (
        "«¿De quién es {O:nom}?», preguntó {S:nom}. «No lo sé», dijo {S2:nom}.",
        "« À qui est {O:nom} ? » a demandé {S:nom}. « Je ne sais pas », a dit {S2:nom}.",
        "„Wem gehört {O:nom}?“, fragte {S:nom}. „Ich weiß es nicht“, sagte {S2:nom}.",
        "«Чьё это?» — {S:?спросил/спросила} {S:nom}. «Не знаю», — {S2:?сказал/сказала} {S2:nom}.",
    ),
    (
        "{S:^nom} se quedó {P:in} porque {R}.",
        "{S:^nom} est {S:?resté/restée} {P:in} parce qu'{R}.",
        "{S:^nom} blieb {P:in}, weil {R}.",
        "{S:^nom} {S:?остался/осталась} {P:in}, потому что {R}.",
    ),
    (
        "{S:^dat} le gustaba mucho {O:nom}.",
        "{S:^nom} aimait beaucoup {O:acc}.",
        "{S:^dat} gefiel {O:nom} sehr.",
        "{S:^dat} очень {O:?нравился/нравилась/нравилось} {O:nom}.",
    ),
    (
        "{S:^nom} quería {W} {O:acc}.",
        "{S:^nom} voulait {W} {O:acc}.",
        "{S:^nom} wollte {O:acc} {W}.",
        "{S:^nom} {S:?хотел/хотела} {W} {O:acc}.",
    ),
    (
        "{S:^nom} no encontró {O:acc}.",
        "{S:^nom} n'a pas trouvé {O:acc}.",
        "{S:^nom} fand {O:acc} nicht.",
        "{S:^nom} не {S:?нашёл/нашла} {O:acc}.",
    ),
    (
        "{P:^in} había {O:one}.",
        "{P:^in}, il y avait {O:one}.",
        "{P:^in} lag {O:one}.",
        "{P:^in} {O:?лежал/лежала/лежало} {O:nom}.",
    ),
    (
        "{O:^nom} era más {O:?caro/cara} que {O2:nom}.",
        "{O:^nom} était plus {O:?cher/chère} que {O2:nom}.",
        "{O:^nom} war teurer als {O2:nom}.",
        "{O:^nom} {O:?был/была/было} дороже {O2:gen}.",
    ),
    (
        "{S:^nom} comió {F:acc} y {S2:nom} no comió nada.",
        "{S:^nom} a mangé {F:acc} et {S2:nom} n'a rien mangé.",
        "{S:^nom} aß {F:acc}, und {S2:nom} aß nichts.",
        "{S:^nom} {S:?съел/съела} {F:acc}, а {S2:nom} ничего не {S2:?ел/ела}.",
    ),
    (
        "{S:^nom} y {S2:nom} compartieron {F:acc}.",
        "{S:^nom} et {S2:nom} ont partagé {F:acc}.",
        "{S:^nom} und {S2:nom} teilten {F:acc}.",
        "{S:^nom} и {S2:nom} разделили {F:acc}.",
    ),
    (
        "{S:^nom} vino con {O:nom} en la mano.",
        "{S:^nom} est {S:?venu/venue}, {O:acc} à la main.",
        "{S:^nom} kam mit {O:dat} in der Hand.",
        "{S:^nom} {S:?пришёл/пришла} с {O:ins} в руках.",
    ),
)
"""Sentences that may stand anywhere."""

FEW: Frame = (
    "{S:^nom} tenía {N} {O:many}.",
    "{S:^nom} avait {N} {O:many}.",
    "{S:^nom} hatte {N} {O:many}.",
    "У {S:gen} было {N} {O:few}.",
)
"""Two to four of a thing: Russian takes the genitive singular."""

MANY: Frame = (*FEW[:3], "У {S:gen} было {N} {O:many}.")
"""Five and more: the genitive plural."""

OLDER: Frame = (
    "{S:^nom} es mayor que {S2:nom}.",
    "{S:^nom} est plus {S:?âgé/âgée} que {S2:nom}.",
    "{S:^nom} ist älter als {S2:nom}.",
    "{S:^nom} старше {S2:gen}.",
)

FOLLOWUPS: tuple[Frame, ...] = (
    (
        "Después volvió a casa.",
        "Ensuite, {S:?il est rentré chez lui/elle est rentrée chez elle}.",
        "Danach ging {S:?er/sie} nach Hause.",
        "Потом {S:?он вернулся/она вернулась} домой.",
    ),
    (
        "Durmió mal.",
        "{S:?Il/Elle} a mal dormi.",
        "{S:?Er/Sie} schlief schlecht.",
        "{S:?Он спал/Она спала} плохо.",
    ),
    (
        "Esperó una hora.",
        "{S:?Il/Elle} a attendu une heure.",
        "{S:?Er/Sie} wartete eine Stunde.",
        "{S:?Он ждал/Она ждала} целый час.",
    ),
    (
        "Abrió la ventana y miró afuera.",
        "{S:?Il/Elle} a ouvert la fenêtre et a regardé dehors.",
        "{S:?Er/Sie} öffnete das Fenster und sah hinaus.",
        "{S:?Он открыл окно и посмотрел/Она открыла окно и посмотрела} на улицу.",
    ),
    (
        "Se rio y no dijo nada.",
        "{S:?Il/Elle} a ri et n'a rien dit.",
        "{S:?Er/Sie} lachte und sagte nichts.",
        "{S:?Он засмеялся и ничего не сказал/Она засмеялась и ничего не сказала}.",
    ),
    (
        "Preparó un té.",
        "{S:?Il/Elle} a préparé un thé.",
        "{S:?Er/Sie} kochte Tee.",
        "{S:?Он заварил/Она заварила} чай.",
    ),
    (
        "Conocía bien el camino.",
        "{S:?Il/Elle} connaissait bien le chemin.",
        "{S:?Er/Sie} kannte den Weg gut.",
        "{S:?Он хорошо знал/Она хорошо знала} дорогу.",
    ),
    (
        "Pensó en su madre.",
        "{S:?Il/Elle} a pensé à sa mère.",
        "{S:?Er dachte an seine/Sie dachte an ihre} Mutter.",
        "{S:?Он подумал/Она подумала} о своей матери.",
    ),
)
"""Sentences about the subject of the one before."""
