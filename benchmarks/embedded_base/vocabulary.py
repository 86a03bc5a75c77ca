"""The words of the embedded corpus and the facts between them.

Each table is one line per word, its columns separated by spaces; `_` stands for a space inside a
column and `-` for "none". Everything is common knowledge, written for this package.
"""

from __future__ import annotations


def split_words(text: str) -> tuple[str, ...]:
    """Return the words of a text between its white space."""
    return tuple(text.split())


def _rows(text: str) -> tuple[tuple[str, ...], ...]:
    """Split a table; `;` ends a row."""
    rows = (row.split() for row in text.replace("\n", " ").split(";"))
    return tuple(tuple(cell.replace("_", " ") for cell in row) for row in rows if row)


ANIMALS = _rows("""
cat mammal kitten meows house; dog mammal puppy barks house; horse mammal foal neighs farm;
cow mammal calf moos farm; sheep mammal lamb bleats farm; goat mammal kid bleats farm;
pig mammal piglet grunts farm; lion mammal cub roars plain; tiger mammal cub roars forest;
bear mammal cub growls forest; wolf mammal cub howls forest; fox mammal cub barks forest;
rabbit mammal kit - field; mouse mammal - squeaks house; rat mammal - squeaks city;
deer mammal fawn - forest; elephant mammal calf - plain; monkey mammal - chatters forest;
camel mammal calf - desert; donkey mammal foal brays farm; whale mammal calf sings sea;
dolphin mammal calf clicks sea; seal mammal pup barks sea; bat mammal - squeaks cave;
owl bird owlet hoots forest; hen bird chick clucks farm; duck bird duckling quacks lake;
goose bird gosling honks lake; swan bird cygnet - lake; crow bird - caws field;
eagle bird eaglet screams mountain; parrot bird chick talks forest; pigeon bird - coos city;
robin bird chick sings garden; penguin bird chick - sea; gull bird chick screams sea;
frog amphibian tadpole croaks lake; toad amphibian tadpole croaks garden;
newt amphibian - - lake; snake reptile - hisses desert; lizard reptile - - desert;
turtle reptile - - sea; crocodile reptile - - river; salmon fish - - river; trout fish - - river;
shark fish pup - sea; tuna fish - - sea; carp fish - - lake; eel fish - - river;
bee insect - buzzes garden; ant insect - - garden; fly insect - buzzes kitchen;
wasp insect - buzzes garden; beetle insect - - forest; butterfly insect caterpillar - garden;
moth insect caterpillar - garden; cricket insect - chirps field; spider arachnid - - cave;
""")
"""(animal, class, young, the verb of its sound, where it lives)."""

FOODS = _rows("""
apple fruit; pear fruit; plum fruit; peach fruit; cherry fruit; lemon fruit; orange fruit;
banana fruit; grape fruit; melon fruit; mango fruit; fig fruit; strawberry fruit;
carrot vegetable; potato vegetable; onion vegetable; cabbage vegetable; bean vegetable;
pea vegetable; leek vegetable; turnip vegetable; pumpkin vegetable; tomato vegetable;
pepper vegetable; lettuce vegetable; cake dessert; pie dessert; pudding dessert;
biscuit dessert; pancake dessert; sandwich meal; soup meal; stew meal; salad meal; pizza meal;
omelette meal; tea drink; coffee drink; milk drink; water drink; juice drink; cocoa drink;
bread staple; rice staple; pasta staple; cheese dairy; butter dairy; cream dairy;
yogurt dairy; egg protein; ham meat; bacon meat; sausage meat; beef meat; walnut nut; almond nut;
""")
"""(food, kind)."""

UNCOUNTED = frozenset(
    split_words("""
tea coffee milk water juice cocoa bread rice pasta cheese butter cream yogurt ham bacon beef
lettuce soup stew wool paper glass iron gold silver snow rain sand
""")
)
"""Nouns without an article or plural in the corpus."""

PROFESSIONS = _rows("""
baker bakery bake bread; teacher school teach children; doctor hospital treat patients;
nurse hospital help patients; farmer farm grow vegetables; sailor ship sail boats;
pilot airport fly planes; driver station drive buses; cook kitchen prepare meals;
waiter restaurant serve guests; judge court hear cases; lawyer court defend clients;
painter studio paint pictures; writer library write books; singer theatre sing songs;
actor theatre play parts; dancer theatre perform dances; carpenter workshop build tables;
smith workshop forge tools; tailor shop sew coats; shoemaker shop mend shoes; butcher shop cut meat;
fisherman harbour catch fish; miner mine dig coal; soldier camp guard walls;
guard museum watch doors; clerk office file papers; banker bank lend money;
engineer factory design machines; mechanic garage repair cars; plumber house fix pipes;
gardener garden plant flowers; librarian library lend books; scientist laboratory test ideas;
chemist laboratory mix liquids; astronomer observatory study stars; vet clinic heal animals;
dentist clinic clean teeth; barber shop cut hair; grocer market sell fruit;
potter workshop shape bowls; weaver workshop weave cloth; editor office correct texts;
journalist newspaper report news; musician hall play music; shepherd hill tend sheep;
hunter forest track deer; king palace rule lands; mayor town_hall lead towns;
""")
"""(profession, workplace, verb, what that verb is done to)."""

THINGS = _rows("""
hammer tool; saw tool; spade tool; rake tool; drill tool; axe tool; needle tool; ladder tool;
chair furniture; table furniture; bed furniture; sofa furniture; desk furniture; shelf furniture;
cupboard furniture; bench furniture; stool furniture; coat clothing; shirt clothing;
hat clothing; scarf clothing; glove clothing; sock clothing; shoe clothing; boot clothing;
dress clothing; belt clothing; jacket clothing; car vehicle; bus vehicle; train vehicle;
bicycle vehicle; boat vehicle; ship vehicle; plane vehicle; tram vehicle; lorry vehicle;
cart vehicle; violin instrument; piano instrument; flute instrument; drum instrument;
guitar instrument; trumpet instrument; harp instrument; cup vessel; bowl vessel; bottle vessel;
jug vessel; bucket vessel; pot vessel; pan vessel; rose flower; tulip flower; lily flower;
daisy flower; poppy flower; oak tree; pine tree; birch tree; willow tree; maple tree; ash tree;
iron metal; gold metal; silver metal; copper metal; tin metal; book text; letter text; map text;
poem text; list text; newspaper text; ball toy; doll toy; kite toy; puzzle toy; circle shape;
square shape; triangle shape; key object; lamp object; candle object; clock object; box object;
basket object; bag object; coin object; ring object; rope object; mirror object; pen object;
pencil object; knife object; fork object; spoon object; plate object; blanket object;
pillow object; window object; door object; stone object; ticket object; picture object;
umbrella object; phone object; radio object; stamp object; button object; flag object;
""")
"""(thing, kind)."""

PLACES = split_words("""
garden kitchen market school library forest river lake harbour station village city park bridge
museum farm field hill mountain beach island church castle tower hotel theatre factory office
hospital bakery cave valley desert garage palace square street yard attic cellar cottage barn mill
well shop cafe stadium airport temple
""")

COLOURS = split_words("red blue green yellow white black brown grey pink purple orange golden")
COLOURED = _rows("""
grass green; snow white; coal black; blood red; lemon yellow; milk white; soot black; sky blue;
chocolate brown; frog green; crow black; swan white; elephant grey; banana yellow; carrot orange;
strawberry red; bark brown; sun yellow; leaf green; sea blue; ash grey; plum purple;
""")
"""(thing, its usual colour)."""

ANTONYMS = _rows("""
big small; hot cold; old young; tall short; happy sad; fast slow; loud quiet; light heavy;
rich poor; strong weak; hard soft; clean dirty; wet dry; early late; full empty; good bad;
high low; thick thin; wide narrow; bright dark; brave timid; kind cruel; polite rude; deep shallow;
sharp blunt; smooth rough; sweet bitter; near far; cheap costly; safe risky; open closed; new used;
warm cool; fresh stale; long brief; simple complex; calm nervous; clever foolish; lazy busy;
tight loose; proud humble; gentle fierce; true false; left right; first last; awake asleep;
""")
"""(adjective, its opposite)."""

COMPARATIVES = _rows("""
big bigger biggest; small smaller smallest; hot hotter hottest; cold colder coldest;
old older oldest; young younger youngest; tall taller tallest; short shorter shortest;
fast faster fastest; slow slower slowest; loud louder loudest; rich richer richest;
poor poorer poorest; strong stronger strongest; weak weaker weakest; hard harder hardest;
soft softer softest; clean cleaner cleanest; thin thinner thinnest; wide wider widest;
bright brighter brightest; dark darker darkest; brave braver bravest; kind kinder kindest;
deep deeper deepest; sharp sharper sharpest; sweet sweeter sweetest; warm warmer warmest;
fresh fresher freshest; happy happier happiest; busy busier busiest; good better best;
bad worse worst; heavy heavier heaviest; dirty dirtier dirtiest; high higher highest;
""")
"""(adjective, comparative, superlative)."""

TRAITS = split_words("""
big small old young tall short happy sad quiet loud strong weak clean dirty brave timid kind
polite clever lazy busy calm proud gentle nervous foolish hungry tired friendly careful
""")
"""Adjectives for people and animals."""
LOOKS = split_words("""
big small old new heavy light clean dirty wooden broken shiny cheap round square thick thin useful
pretty strange plain smooth rough warm cold
""")
"""Adjectives for things."""

TRANSITIVE = _rows("""
see saw seen; watch watched watched; find found found; follow followed followed;
help helped helped; hear heard heard; like liked liked; love loved loved; know knew known;
paint painted painted; draw drew drawn; chase chased chased; carry carried carried;
call called called; meet met met; visit visited visited; remember remembered remembered;
feed fed fed; wash washed washed; greet greeted greeted; push pushed pushed; pull pulled pulled;
hide hid hidden; choose chose chosen; bring brought brought; praise praised praised;
""")
"""(verb, past, participle): a living or dead object will do."""
HANDLING = _rows("""
buy bought bought; sell sold sold; take took taken; hold held held; make made made;
break broke broken; lose lost lost; keep kept kept; throw threw thrown; open opened opened;
close closed closed; lift lifted lifted; move moved moved; repair repaired repaired;
clean cleaned cleaned; drop dropped dropped; borrow borrowed borrowed; send sent sent;
steal stole stolen; build built built; burn burned burned; use used used; need needed needed;
""")
"""(verb, past, participle) for things."""
EATING = _rows("""
eat ate eaten; cook cooked cooked; taste tasted tasted; want wanted wanted; share shared shared;
order ordered ordered; prepare prepared prepared; enjoy enjoyed enjoyed;
""")
INTRANSITIVE = _rows("""
sleep slept slept; run ran run; walk walked walked; sing sang sung; laugh laughed laughed;
cry cried cried; wait waited waited; rest rested rested; swim swam swum; dance danced danced;
fall fell fallen; jump jumped jumped; sit sat sat; stand stood stood; work worked worked;
play played played; smile smiled smiled; arrive arrived arrived; leave left left;
shout shouted shouted; dream dreamed dreamed; think thought thought; travel travelled travelled;
""")
OTHER_VERBS = _rows("""
go went gone; come came come; give gave given; write wrote written; read read read;
speak spoke spoken; drink drank drunk; drive drove driven; ride rode ridden; fly flew flown;
grow grew grown; begin began begun; win won won; teach taught taught; catch caught caught;
fight fought fought; sweep swept swept; wear wore worn; tear tore torn; freeze froze frozen;
""")
ADVERBS = split_words("""
quickly slowly quietly loudly happily sadly carefully often always never sometimes again early
late gently calmly proudly today together alone
""")
PREPOSITIONS = split_words("in near behind beside at")

WOMEN = split_words("""
Anna Maria Clara Emma Lucy Nora Ruth Sara Julia Helen Alice Rosa Ida Lena Mary Jane Kate Eva Grace
Olga
""")
MEN = split_words("""
Tom Peter John Paul Max Henry Oscar Felix Hugo Leo David Simon Adam Karl Mark Jack Ben Otto George
Ivan
""")
COUNTRIES = _rows("""
France Paris French Europe; Spain Madrid Spanish Europe; Italy Rome Italian Europe;
Germany Berlin German Europe; Portugal Lisbon Portuguese Europe; Greece Athens Greek Europe;
Poland Warsaw Polish Europe; Norway Oslo Norwegian Europe; Sweden Stockholm Swedish Europe;
Denmark Copenhagen Danish Europe; Finland Helsinki Finnish Europe;
Hungary Budapest Hungarian Europe;
Austria Vienna German Europe; Ireland Dublin English Europe; Russia Moscow Russian Europe;
Turkey Ankara Turkish Asia; Japan Tokyo Japanese Asia; China Beijing Chinese Asia;
Thailand Bangkok Thai Asia; Vietnam Hanoi Vietnamese Asia; Iran Tehran Persian Asia;
Egypt Cairo Arabic Africa; Kenya Nairobi Swahili Africa; Cuba Havana Spanish America;
Peru Lima Spanish America; Chile Santiago Spanish America; Canada Ottawa English America;
""")
"""(country, capital, a language spoken there, continent)."""

NUMBERS = split_words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen twenty
""")
DAYS = split_words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = split_words("""
January February March April May June July August September October November December
""")
SEASONS = split_words("spring summer autumn winter")
WEATHER = split_words("sunny rainy windy cloudy foggy snowy stormy frosty")

SPANISH_NOUNS = _rows("""
cat gato m; dog perro m; horse caballo m; cow vaca f; sheep oveja f; goat cabra f; pig cerdo m;
lion leon m; tiger tigre m; bear oso m; wolf lobo m; fox zorro m; mouse raton m; duck pato m;
frog rana f; bee abeja f; apple manzana f; lemon limon m; orange naranja f; onion cebolla f;
potato patata f; bread pan m; milk leche f; water agua f; cheese queso m; egg huevo m;
house casa f; table mesa f; chair silla f; bed cama f; door puerta f; window ventana f;
book libro m; letter carta f; hat sombrero m; shirt camisa f; shoe zapato m; boat barco m;
train tren m; car coche m; knife cuchillo m; spoon cuchara f; plate plato m; cup taza f;
river rio m; lake lago m; mountain montana f; island isla f; bridge puente m; garden jardin m;
city ciudad f; street calle f; school escuela f; king rey m; doctor medico m; baker panadero m;
""")
"""(English, Spanish without accents, gender)."""
SPANISH_ADJECTIVES = _rows("""
red rojo; white blanco; black negro; yellow amarillo; small pequeno; tall alto; new nuevo;
old viejo; clean limpio; good bueno; bad malo; cold frio; green verde; big grande; poor pobre;
""")
"""(English, Spanish masculine); those in -o take -a with feminine nouns."""
FRENCH_WORDS = _rows("""
cat chat; dog chien; horse cheval; cow vache; pig cochon; bear ours; wolf loup; mouse souris;
duck canard; bird oiseau; apple pomme; lemon citron; bread pain; milk lait; water eau;
cheese fromage; egg oeuf; house maison; table table; chair chaise; bed lit; door porte;
window fenetre; book livre; letter lettre; hat chapeau; shirt chemise; shoe chaussure;
boat bateau; key clef; knife couteau; spoon cuillere; plate assiette; cup tasse; river riviere;
lake lac; island ile; bridge pont; garden jardin; street rue; school ecole; king roi; sun soleil;
""")
GERMAN_WORDS = _rows("""
cat Katze; dog Hund; horse Pferd; cow Kuh; sheep Schaf; pig Schwein; bear Baer; wolf Wolf;
mouse Maus; duck Ente; apple Apfel; pear Birne; bread Brot; milk Milch; water Wasser; egg Ei;
house Haus; table Tisch; chair Stuhl; bed Bett; door Tuer; window Fenster; book Buch;
letter Brief; hat Hut; shirt Hemd; shoe Schuh; boat Boot; train Zug; key Schluessel;
knife Messer; spoon Loeffel; plate Teller; cup Tasse; river Fluss; lake See; mountain Berg;
island Insel; bridge Bruecke; garden Garten; city Stadt; street Strasse; school Schule;
""")
