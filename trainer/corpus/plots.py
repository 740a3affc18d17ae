"""The plots of `stories`: seven beats each, a dash before every beat.

The first beat continues a sentence that names the morning; the others stand alone. `[a|b]` is a choice, `{name}`
a slot.
"""

from __future__ import annotations

_LOST = """
- {hero} reached for {his} {thing} and found that it was gone.
- {He} [looked under the bed|searched every pocket|emptied three drawers], but [there was only dust|found
  nothing]. [It had been a present from {his} grandmother.|{He} had carried it every day since {his} birthday.]
- "[Think of where you had it last|Go back the way you came]," said the {trade}[, without looking up| and went on
  working].
- So {he} walked back to {place}, step by step, [looking at the ground|asking everyone {he} met].
- There, on a [stone|fence post|low branch], sat {a_animal} with the {thing}[ beside it|, guarding it like an egg].
- "[I thought it was mine|I was only keeping it dry|It was so shiny]," [said|mumbled] the {animal}. "[Will you let
  me hold it once more|May I see how it works]?"
- {hero} [thought about it|hesitated] and then [nodded|sat down beside it]. They [shared|ate] {food} [and watched
  the clouds|until the bells rang].
"""

_CONTEST = """
- a notice hung in the square: whoever [built the fastest cart|baked the best pie|carved the finest {animal}] would
  win a prize.
- {hero} wanted to win [more than anything|so much that {he} could not sleep].
- {friend} [wanted it too|entered as well], and for [a week|three days] the two did not [speak|say a word to each
  other].
- On the [day itself|great day], {friend}'s [table broke|knife snapped|wheel came off] [just before the end|in
  front of everybody].
- {hero} could have [gone on alone|won easily]. [Instead|After a moment] {he} [turned back|put down {his} tools] and
  held out a hand.
- "[We can still finish together|Two are faster than one]," {he} said, and {friend} [laughed for the first time that
  week|took it].
- They came in last, [covered in dust|out of breath], and the {trade} gave them {food}[, which was better than any
  prize|, because they had made the whole town smile].
"""

_STORM = """
- {hero} went to {place} with {friend} to [look for stones|gather wood|watch the birds].
- [By noon|Before they noticed], the clouds [had piled up like dark wool|had swallowed the hills], and the wind
  [tore at their coats|howled].
- "We [should|must] go home," said {friend}. "[My feet are wet|I can hardly see you]."
- But the path [was under water|had vanished in the rain]. [They were quite alone.|Nobody answered when they called.]
- Then {hero} [remembered|thought of] the {thing} in {his} bag. [It was not much|It was all they had], but it [would
  do|was enough].
- With it they [made a signal|kept up their spirits|marked the way], until a [light|lantern] [swung towards them|shone
  through the rain]: it was the {trade}, [wrapped in a huge coat|with a rope over one shoulder].
- That night they sat by the stove with {food} and [told it all again|told the story three times], and the storm
  grew [bigger every time|a little bigger with every word].
"""

_STRANGER = """
- {a_animal} [stood|sat] [at the door|on the step], [thin and wet|with a limp].
- "[I have come a long way|I have walked since yesterday]," it said. "[Is there a corner where I could sleep|Could
  you spare something to eat]?"
- {hero} [was a little afraid|did not know what to say], but {he} [opened the door wide|brought {food}].
- {friend} shook {friends} head. "[You cannot trust a stranger|It will steal your {thing}]," {friend_he}
  [warned|whispered].
- But the {animal} only [curled up by the fire|ate, thanked them and slept]. In the morning it was gone, and [the
  path was swept clean|somebody had stacked the wood].
- [Many weeks later|A month passed, and then] {hero} lost {his} way near {place}, and [night was coming|it was
  getting dark].
- "[Follow me|This way]," said a voice [{he} knew|from the dark]. It was the {animal}, [fat and glossy now|with its
  tail held high], and it led {him} [all the way home|to the first lamp of the town].
"""

_MENDING = """
- the {trade}'s {instrument} broke, and [the whole street heard the crash|with it went the only music in town].
- "[It cannot be mended|That is the end of it]," [sighed the {trade}|people said].
- {hero} [picked up|asked for] the pieces and took them [home|to the attic]. There were [nineteen|twenty-three|forty]
  of them.
- The first day {he} [sorted them|only looked at them]. The second day {he} [glued the wrong two together|cut {his}
  thumb]. The third day {he} [wanted to give up|nearly threw everything into the river].
- Then {friend} came with [{food}|a pot of glue and steady hands], and [they worked until the candle went out|two
  pairs of eyes saw more than one].
- When they brought it back, it [had a crack like a river on a map|squeaked a little], but it [played|sang].
- "[It is better than before|Now it has a story]," said the {trade}, and [left the window open, so that everyone
  could hear|would not have sold it for any money].
"""

_SECRET = """
- {hero} found a [small door|gap] in the wall behind the {trade}'s house[, half hidden by ivy|, no wider than a loaf
  of bread].
- [Of course {he} went in.|{He} counted to ten and crept through.] On the other side lay a garden [that nobody had
  touched for years|full of thistles and bees].
- Every [afternoon|evening] {he} [came back|slipped away] with a [spade|watering can], and told nobody, not even
  {friend}.
- But {a_animal} had seen {him}. "[You dig like a beginner|You water too much]," it [remarked|said kindly]. "[Let me
  show you|Watch how the moles do it]."
- [Before the year was over|When it was warm again|After a hundred days] there were [beans|poppies|lettuces], more
  than {he} could count.
- So {hero} did the hardest thing of all: {he} told [{friend}|everyone]. First one came, then five, each with [a
  chair|a basket|{food}].
- The door [is still there|has been open ever since], and [anyone may go in who closes it behind them|the ivy is cut
  every spring].
"""

_NOISE = """
- {hero} heard a strange noise [in the attic|under the floor|behind the wall]: [tap, tap, pause, tap|a long low
  humming|something like a cough].
- "[It is only the wind|Old houses talk]," said {friend}, but {friend_he} [did not want to go and look|pulled the
  blanket higher].
- The noise came back [the next night|every night at ten], [a little louder|always three times].
- At last {hero} took {a_thing} and [went to see|went looking, one step at a time]. {His} heart [beat like a drum|was
  beating fast].
- [Behind a trunk|In the corner] sat {a_animal}, [trying to crack a nut|turning the handle of an old machine]. It was
  [as frightened as {he} was|far more scared than {he} was].
- "[I am sorry|Forgive me]," it said. "[It is too cold outside|I have nowhere else to practise]."
- From then on there was a plate of {food} [on the stairs|by the trunk] each evening, and [the noise became a kind of
  music|nobody in the house minded it].
"""

_MESSAGE = """
- the {trade} gave {hero} a letter. "[Take it|Carry this] to {place} [before dark|and do not open it]," said the
  {trade}.
- The road was long and full of interesting things. {hero} stopped to [watch {a_animal}|help {friend} with a cart|eat
  {food}].
- When {he} [reached into {his} bag|looked again], the letter was [gone|soaked through]. {He} [felt cold all over|sat
  down and did not move].
- {He} could [say that the wind had taken it|run home and hide]. {He} thought about that for a while.
- But {he} went on, and knocked, and told the truth [with a dry mouth|in a very small voice].
- The old [woman|man] who opened only [laughed|smiled]. "It said: [be kind to the one who brings this|give the bearer
  {a_thing}]. [And it seems you are honest|I know, because I get one every year]."
- {hero} [walked home under the stars|ran all the way home] and [slept without dreaming|told {friend} everything].
"""

_INVENTION = """
- {hero} decided to build a machine that could [peel apples|turn pages|wake people gently|count sheep].
- {He} collected [springs|wheels], [string|wire] and {a_thing}, and [locked the door of the shed|worked through lunch].
- The first machine [exploded quietly|did nothing at all]. The second [threw {food} at the ceiling|chased the {animal}
  around the yard].
- "[What is it supposed to do|Is it dangerous]?" asked {friend}, [from behind the door|holding an umbrella].
- {hero} [showed {his} drawings|explained]. {friend} [pointed at one wheel|turned the plan around]. "[Is this not
  upside down|Why does this one turn backwards]?"
- So they [turned it|moved one screw], and the machine [began to hum|ran as smoothly as a cat].
- It still stands in the window of the {trade}, with [both their names on it|a small sign: please do not touch].
"""

_SWAPS = """
- {hero} went to market with nothing but {a_thing}.
- The {trade} [looked at the {thing}|turned it over twice] and offered {food} for it. [{hero} was hungry, and so they
  shook hands.|It seemed fair.]
- On the bridge sat {friend} with {a_animal} that would not [move|eat]. {hero} [held out the food|gave it half of the
  food, and then the other half], and it [stood up at once|licked up every crumb].
- "[Take it with you|It likes you better than me]," said {friend}. So now {hero} had {a_animal} and no supper.
- At {place} a [carter|farmer] had [lost his way|dropped his purse in the ditch]. The {animal} [put it right in a
  minute|knew what to do], and the man [laughed with relief|could not thank {him} enough].
- He [reached into his cart|gave {him} the first thing he had in his cart]: it was {a_instrument}, [wrapped in
  straw|a little dusty].
- {hero} carried it home, and [every evening the neighbours came to listen|played until the lamps went out].
"""

_QUESTION = """
- {hero} woke up with a question: [where does the wind sleep|why is the sea salt|who winds up the moon|what do stones
  dream of]?
- {He} asked the {trade}, who [scratched one ear|frowned] and said, "[Ask me something useful|That is older than both
  of us]."
- {He} asked {friend}, who [had three answers, all different|made one up on the spot].
- {He} even asked {a_animal} at {place}. It [blinked twice|thought for a long time]. "[Come back when it is dark|Sit
  down here and be quiet]," it said.
- So {hero} sat there with {food} in {his} bag, while [the light went out of the sky|one star after another came out].
- After an hour {he} [heard the reeds breathe|noticed how still it was]. After two {he} [had forgotten the
  question|began to smile].
- When {he} came home, {friend} asked what {he} had found out. "[A better question|Nothing, and it was wonderful],"
  said {hero}.
"""

PLOTS = (
    _LOST, _CONTEST, _STORM, _STRANGER, _MENDING, _SECRET, _NOISE, _MESSAGE, _INVENTION, _SWAPS, _QUESTION,
)  # fmt: skip
