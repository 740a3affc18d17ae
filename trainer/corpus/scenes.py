"""The scenes of `dialogue`, as scripts.

A scene begins with who speaks. Exchanges stand apart by blank lines, the variants of an exchange by `or`; the
lines of a variant begin with a dash and are spoken in turn. `nothing` lets an exchange be left out. `[a|b]` is a
choice, `{name}` a slot.
"""

from __future__ import annotations

_RESTAURANT = """
Waiter and Guest

- [Good evening|Welcome]. Have you booked?
- [Yes|I have], under the name of {a}. [By the window, if possible.|Somewhere quiet would be nice.]
or
- [Good evening|Welcome]. A table for two?
- [Yes, please.|For {k}, please.] [That one in the corner looks nice.|Is the terrace open?]

- [Follow me, please.|Of course.] May I bring you something to drink?
- {Drink}, please. [And what do you recommend?|And the menu.]
or
- Here is the menu. [And the wine list.|The soup is on the board.]
- Thank you. [What is good today?|What do you recommend?]

- [Today I would take|Many people come for] {dish}.
- [Are there nuts in it?|Is there garlic in it?] [I am allergic.|It does not agree with me.]
- [A little, I am afraid.|I will ask the kitchen. Yes, there is.] Otherwise we have {dish2}.
- [Then I will try {dish2}.|{Dish2} it is.]
or
- I [would take|can recommend] {dish}. [It is our oldest recipe.|The cook is proud of it.]
- [Is it very spicy?|Is it a large portion?]
- [Not at all|No, not at all], I promise.
- [Good, then I will have that.|That sounds right.] [And a small salad.|And some bread, please.]

- And something sweet afterwards?
- [I never say no to {dessert}.|Let me think about {dessert}.|Only a coffee, thank you.]
or
nothing

- [Certainly.|With pleasure.] It will take about {minutes} minutes.
- [No hurry.|We have time.] [The evening is long.|I have my book with me.]
or
- [Thank you.|Gladly.] [Enjoy the view in the meantime.|I will light the candle.]
- [How kind.|Thank you very much.]
"""

_SHOP = """
Clerk and Customer

- [Can I help you?|Are you looking for something?]
- [Yes, a {cloth} for the winter.|I need a {cloth}.] [In {color}, if you have it.|Nothing too expensive.]
or
- [Good morning.|Hello.] [We have just opened.|Everything on the left is reduced.]
- [How nice.|Good to know.] I am looking for a {cloth}[ in {color}| that lasts].

- Which size do you take?
- [Usually medium.|Large, I think.|That depends on the cut.] [May I try it on?|Where can I try it?]
or
- [This one came in on {day}.|What about this one?]
- [It looks warm.|I like the buttons.] [May I try it on?|Do you have a mirror?]

- The cabin is behind you. [How does it feel?|Well, how is it?]
- [It is a bit tight here.|It is too wide.|I can hardly move in it.]
or
- The mirror is over there. [It suits you.|What do you think?]
- [It fits, but the colour is not mine.|I am not sure about the colour.] Is there one in {color2}?

- [One moment.|Let me look in the back.] [Here, this is the last one.|Here, try this.]
- [Much better.|That is the one.] How much is it?
- {price} euros. [It was {price2} last week.|Reduced from {price2}.]
- [I will take it.|Then I do not need to think twice.] [Can I pay by card?|Can I bring it back?]
or
- I can order another one. [It would be here on {day2}.|It takes {k} days.]
- [I would rather not wait.|That is too late for me.] What does this one cost?
- It is {price2} euros. [It is wool, through and through.|But it will last for years.]
- [More than I wanted to spend.|Hm.] [All right, it is a cold winter.|But it is beautiful. I will take it.]

- [Of course.|Naturally.] Would you like a bag?
- [No, thank you, I will wear it.|Yes, please, it is raining.]
or
- [Of course. A good choice.|Certainly. You will not regret it.]
- [I hope so.|My old one lasted {k} years.] Goodbye!
"""

_DOCTOR = """
Doctor and Patient

- [Come in, please.|Good morning, sit down.] [What brings you here?|What is the trouble?]
- It is {pain}. [It started on {day}.|It has been like this for {k} days.]
or
- [You have been here before, have you not?|We have not seen you for a long time.]
- [Not for {k} years.|Luckily not.] But now it is {pain}.
or
- How are you[, {a}|]?
- [Not so well.|If I only knew.] It is {pain}, [since {day}|every time it rains].

- [Is it worse in the morning or at night?|When is it worst?]
- [Mostly at night.|In the morning, and after work.] [I slept badly.|I could hardly get up.]
or
- [Does it hurt all the time?|Is it a sharp pain?]
- [Only when I turn round.|It comes and goes.] [I could not carry the shopping.|Today it is a little better.]

- Have you taken anything?
- [Only tea with honey.|Some tablets from the pharmacy.] [They did not help much.|It was better for an hour.]
or
- Have you had this before?
- [Once, {k} years ago. It went away by itself.|Never. That is why I came.|Every winter, more or less.]
or
nothing

- Let me have a look. [Does this hurt?|And when I press here?]
- [Ouch, yes.|A little.] [Is it serious?|Will I be able to work?]

- [Nothing to worry about.|It is not serious.] [It needs rest, that is all.|You have been sitting too much.]
- [That is a relief.|I thought so.] [May I still go to {hobby}?|Can I do anything for it?]
or
- [I would like to take a picture of it.|Let us do a blood test.] [Can you come on {day2}?|It is quickly done.]
- [Do I have to fast for it?|Does it hurt?|I have never liked needles, but all right.]

- [Drink a lot and keep warm.|Go for a walk every day.] And come back [on {day2}|in a week] if it is not better.
- [Thank you, doctor.|I will.] [Goodbye.|I feel better already.]
"""

_DIRECTIONS = """
Visitor and Passer-by

- [Excuse me|Sorry to bother you], how do I get to {spot}?
- [It is not far.|Oh, that is easy.] [Go straight on|Walk along here] as far as {mark}.
or
- [Excuse me|Sorry to bother you], is this the way to {spot}?
- [I am afraid not.|No, you are going the wrong way.] Walk back to {mark}.

- [As far as|To] {mark}, I see. And then?
- Then [turn {side}|take the second street on the {side}] and [cross the square|walk past {mark2}].

- Is there a bus?
- [The {k} goes every {minutes} minutes.|Yes, the {k}, from over there.] [But on foot you are
  faster.|Buy a ticket first.]
or
- How long does it take on foot?
- [About {minutes} minutes.|A quarter of an hour, if you do not stop.] [It is a pretty walk.|There is
  a hill in between.]

- [And is it open on {day}?|Do you know when it closes?]
- [I think so, until {hour}.|I am not sure. I have never been inside.]
or
nothing

- [So: {mark}, {side}, and straight on.|{Mark}, then {side}. I will remember that.]
- [Exactly.|You cannot miss it.] [Look for the clock tower.|If you see the river, you have gone too far.]
or
- [Could you show me on the map?|Is it on this map?]
- [Here, where the two streets meet.|This map is older than I am. But the street is still there.]

- [That is very kind.|Thank you so much.] [It is my first time in {city}.|Everybody is so friendly in {city}.]
- [Enjoy your stay!|Then do not miss the market on {day2}.|Have a good day.]
"""

_TICKET = """
Traveller and Agent

- [A ticket to {city}, please.|I would like to go to {city}.]
- [For which day?|When would you like to travel?]
or
- [Good morning.|Hello.] Are there still seats to {city} on {day}?
- [Let me look.|One moment.] [In the morning, yes.|A few, at {hour}.]

- [On {day}, around {hour}.|{Day}, please.] [Do I have to change?|Is it direct?]
- [Once, in {city2}.|You change in {city2}.] [You have {minutes} minutes there.|It is the same platform.]

- [That is rather tight.|I am not so quick with my suitcase.] Is there a later one?
- [One leaves at {hour2}.|There is one every two hours.] [It is cheaper, too.|It is a bit slower.]
or
- [That is fine.|Good.] [A window seat, if there is one.|In the quiet carriage, please.]
- [Carriage {k}, by the window.|The last one, you are lucky.]

- Can I take my bicycle?
- [Yes, for {k} euros more.|Only in the last carriage.|Not on this train, unfortunately.]
or
nothing

- [And what does it cost?|How much is the return ticket?]
- {price} euros there, {price2} there and back. [When are you coming back?|It is valid for a month.]
- [In a week, I think.|I do not know yet.] [There and back, please.|Then the return ticket, by card.]
- [Thank you.|That is right.] Platform {k}. [Have a good journey!|Enjoy {city}!]
or
- [How much is it?|What do I owe you?]
- {price} euros. [Cash or card?|With a family card it would be less.]
- [By card, please.|Here you are, it is exact.] [And where does it leave from?|Which platform?]
- [Platform {k}, at {hour2}.|From platform {k}, at the back.] [Have a good journey!|Do not forget your umbrella.]
"""

_SUPPORT = """
Support and Caller

- [Good afternoon, this is {a}.|Hello, you are speaking with {a}.] [How can I help?|What can I do for you?]
- My {device} [makes a strange noise|has not worked since {day}]. [There is a red light.|I have tried everything.]

- [I am sorry to hear that.|That sounds annoying.] Have you switched it off and on again?
- [Of course, {k} times.|Twice. Nothing changed.]
or
- [I have to ask|Forgive the question]: is it plugged in?
- [I was waiting for that. Yes.|One moment. Yes, it is.]

- [Could you read me the number on the back?|What does the label say?]
- [Just a moment, I have to turn it round.|It is very small.] It says {code}.

- [Ah, I see.|Thank you.] [That model needs an update.|It is a known fault.] Hold the button for {k} seconds.
- [I am holding it.|All right.] [Now it is blinking.|Now the light is yellow.]
or
- [That one is new to me.|Interesting.] [I will ask a colleague.|Let me look it up.]
- [I can wait.|Take your time.] [The music is nice.|I have made tea.]

- [Is there dust in the opening?|Can you see a small lid?]
- [A whole carpet of it.|Yes, and a hair clip in there.] [That is not mine.|How did that get there?]
or
nothing

- [Thank you for waiting.|Good.] [Wait until the light is green.|It should restart by itself now.]
- It is green! [You have saved my {day2}.|I should have called earlier.]
or
- [Then we will send you a new one.|I will send someone on {day2}.] [It costs nothing.|It will take a morning.]
- [That is generous.|Good, I will be at home.] Thank you, {a}.

- [Is there anything else?|Can I help with anything else?]
- [No, that was all.|Not today.] Goodbye!
"""

_MARKET = """
Vendor and {a}

- [Fresh {item}|Look at these {item}], [from this morning!|the last of the season!]
- They [look|smell] wonderful. [How much are they?|What does a kilo cost?]
or
- [What may it be?|Good morning, {a}!]
- [I need {item} for {k} people.|Some {item}, if they are ripe.] What do they cost?

- {k} euros a kilo. [Cheaper than yesterday.|For you, a little less.]
- [That is a lot.|Hm.] [On {day} they were cheaper.|Over there they cost less.]
- [But not these.|There you get what you pay for.] Taste one. [Well?|And?]
- [All right, you win.|Oh. Yes.] [Give me a kilo.|Half a kilo, please.]
or
- [I grow them myself.|They are from the other side of the river.] {k} euros a kilo.
- [May I taste one?|They look a little small.]
- [Naturally.|The small ones are the best, try one.] [People come from {city} for them.|Well? Am I right?]
- [Then a kilo, please.|You have convinced me. Half a kilo.]
or
- [Today {k} euros.|{k} euros, and a little less if you bring back the basket.]
- [And are they ripe?|Do they keep until {day}?]
- [Certainly.|In a cool place, yes.] [Smell this one.|I eat them myself.]
- [Mmm.|That is a good sign.] [Two kilos, then.|I will take a basket.]

- [Anything else?|And what else?] The {item2} are on offer.
- [A bag of {item2}, then.|Not today, I still have to carry it home.]
or
- [Do you have a recipe?|What will you make of it?]
- [A pie, if my oven works.|{Dish}, as always on {day2}.]
or
nothing

- That makes {k} euros fifty. [And one on top for you.|Shall I put it in two bags?]
- [Thank you.|How kind.] [See you on {day2}!|Keep the change.]
"""

_PLANS = """
{a} and {b}

- [Have you got time on {day}?|Are you free on {day}?]
- [On {day} I have {hobby} until {hour}.|My sister is visiting on {day}.] [Why?|What is it about?]
or
- [I want to go to {city}.|{City} is only two hours away.] [Will you come?|Are you coming?]
- [When?|On {day}?] [I have {hobby} until {hour}.|My sister is visiting.]

- [Then on {day2}.|And on {day2}?] The weather is supposed to be better, too.
- {Day2} is fine. [Shall I book something?|Who else is coming?]
- [{c}, and maybe {d}.|Ask {c} first, and {d}.]
- [Not {d} again!|Oh, I like {c}.] [The last time we missed the train.|Then it will be fun.]
or
- [What a pity.|Oh.] [Could you come later?|And in the evening?]
- I would be too tired. [But on {day2} I have all day.|What about {day2}?]
- [{Day2}, then.|Even better.] [I would like to walk along the river.|First {spot}, then lunch.]
- [And if it rains?|In these shoes?]

- [We can always go to the cinema.|I will think of everything.] [And we need something to eat.|Just bring yourself.]
- [Good idea.|Lovely.] I will bring {drink}.
or
nothing

- Where shall we meet?
- At {mark}, at {hour2}. [Do not be late.|I will wait ten minutes, no longer.]
- [Me, late?|I was late once!] [I will set two alarms.|My clock was wrong.]
- [Once a week.|We will see.] [I am looking forward to it.|See you on {day2}!]
or
- How do we get there?
- [I could ask my brother for the car.|By train, from platform {k}, at {hour2}.]
- [Good.|Then I will pack lightly.] [I will look after the map.|And on the way back we sleep.]
- [You always sleep.|You and maps!] [See you on {day2}.|I am looking forward to it.]
"""

_LIBRARY = """
Librarian and {a}

- [Hello, {a}.|Back again?] [Did you like the last one?|How was the last one?]
- [A bit slow.|I read it in two days.] [Now I would like {book}.|Do you have {book}?]

- [It is out until {day}.|Somebody took it on {day}.]
- [What a pity.|Oh.] [Is there something like it?|What do you have instead?]
- You could try {book2}. [The author used to live in {city}.|People keep asking for it.]
- [What is it about?|Is it any good?]
or
- [It should be on the second floor.|Let me see.] [It is a thick one.|Here it is.]
- [How many pages?|It looks heavy.]
- {pages} pages. [But they fly by.|You will not notice.]
- [I need something for the train.|My evenings are short these days.] What is it about?

- [It begins with a letter that arrives too late.|Two brothers, one boat.|A woman who counts her steps.|It
  is a love story, but nobody says so.] [I will not say more.|You have to read it slowly.]
- [You have convinced me.|Good, I will take it.] [How long may I keep it?|And when must I bring it back?]

- {k} weeks. [You can renew it by phone.|No one is waiting for it.]
- [That will do.|Until then I have read it twice.] [Thank you!|Goodbye!]
or
- On {day2} in {k} weeks. [Tell me how it ends.|And do not lend it to {b} again.]
- [I promise.|That was one time!] Goodbye.
"""

_INTERVIEW = """
Manager and Applicant

- [Thank you for coming.|Please, sit down.] [So you want to work here as a {role}?|Why did you apply as a {role}?]
- [I have done it for {k} years.|I learned it in {city}.] [Now I want something new.|And I like this street.]

- [What did you do before?|And before that?]
- I was a {role2}. [No two days were the same.|It was a good school for patience.]
or
- [Why did you leave your last place?|Why now?]
- The company moved to {city2}. [I did not want to go with it.|We parted as friends.]

- [Tell me about a difficult day.|What was your worst day?]
- [Once everything broke at the same time.|We lost the keys on a {day}.] [At {hour} it worked again.|In the end we
  laughed about it.]
or
- [What do you do when something goes wrong?|And when you do not know what to do?]
- [First I make a list.|I ask someone who knows more.] [Then a cup of tea.|It has always worked so far.]

- [What can you not do?|What would your colleagues complain about?]
- [I cannot sit still in long meetings.|My handwriting.] [But I take notes.|I am working on it.]
or
nothing

- [I like that.|Good.] Do you have questions for us?
- [Who would I work with?|And who would show me everything?]
- [{c} and {d}.|{c}, who has been here for {k} years.] [You will like it.|We eat lunch together.]
- [That sounds good.|I would like that.] And when will I hear from you?
or
- [I like that.|Good.] Could you start in {k} weeks?
- [Yes.|Even earlier.] Could I work from home on {day}?
- [I think so.|Everybody here does.] [The coffee is better at home, too.|As long as you come for the meeting.]
- [Then I have no more questions.|Perfect.] When will I hear from you?

- [By {day2}.|On {day2}, at the latest.] [I have a good feeling.|Thank you for coming.]
- [Thank you for your time.|I look forward to it.] Goodbye.
"""

_NEIGHBOURS = """
{a} and {b}

- [Good morning, {b}!|Hello, neighbour!] [Cold today.|What a wind last night!]
- [Terrible.|I hardly slept.] And now my {device} has stopped, too.

- [I can have a look at it.|Shall I come over at {hour}?] Usually it is only dust.
- [Would you?|Really?] [I was going to call someone on {day}.|I do not want to trouble you.]
or
- [Mine did that last winter.|That happens every year.] The repair cost {price} euros.
- [So much!|For {price} I can buy a new one.] [Perhaps it is only dust.|I will look inside myself first.]

- [That is what neighbours are for.|Say so if you need a hand.] Could you [water my plants|feed the cat] meanwhile?
- [With pleasure.|Of course.] [Where are you going?|Are you going away?]
- To {city}[, for {k} days|, until {day2}]. [I have not been there since school.|My aunt is turning eighty.]
- [How nice.|I was there once.] [The old bridge is beautiful.|Take a warm coat.]

- The key is under the third pot. [I will bring you {item} from the market.|You know where the watering can is.]
- [Everybody knows about that pot!|The third from the left?] [Enjoy your trip.|Come back in one piece.]

- [Do you need anything from {city}?|What shall I bring you?]
- [A postcard with a bridge on it.|Only good weather.|Nothing. Well, perhaps some {item2}.]
or
nothing
"""

SCENES = (
    _RESTAURANT, _SHOP, _DOCTOR, _DIRECTIONS, _TICKET, _SUPPORT, _MARKET, _PLANS, _LIBRARY, _INTERVIEW, _NEIGHBOURS,
)  # fmt: skip
