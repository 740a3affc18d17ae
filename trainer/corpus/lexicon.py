"""The words of `parallel`: one concept a line, in Spanish | French | German | Russian, with the forms it needs.

People:  article noun | article noun (gender after an elided article) | article noun (oblique form of weak nouns) |
         nominative genitive dative accusative instrumental gender
Things:  article singular plural | the same | the same | nominative accusative genitive instrumental,
         genitive plural, gender
Places:  where, where to (one form does for both in French)
The other tables are whole phrases; `?masculine/feminine/neuter` agrees with the subject.
"""

from __future__ import annotations

PEOPLE = """
la abuela | la grand-mère | die Großmutter | бабушка бабушки бабушке бабушку бабушкой f
el abuelo | le grand-père | der Großvater | дедушка дедушки дедушке дедушку дедушкой m
el panadero | le boulanger | der Bäcker | пекарь пекаря пекарю пекаря пекарем m
la vecina | la voisine | die Nachbarin | соседка соседки соседке соседку соседкой f
el médico | le médecin | der Arzt | врач врача врачу врача врачом m
la alumna | l'écolière f | die Schülerin | ученица ученицы ученице ученицу ученицей f
el niño | le garçon | der Junge Jungen | мальчик мальчика мальчику мальчика мальчиком m
el pescador | le pêcheur | der Fischer | рыбак рыбака рыбаку рыбака рыбаком m
la tía | la tante | die Tante | тётя тёти тёте тётю тётей f
el tío | l'oncle m | der Onkel | дядя дяди дяде дядю дядей m
el jardinero | le jardinier | der Gärtner | садовник садовника садовнику садовника садовником m
el conductor | le chauffeur | der Fahrer | водитель водителя водителю водителя водителем m
la cocinera | la cuisinière | die Köchin | повариха поварихи поварихе повариху поварихой f
la vendedora | la vendeuse | die Verkäuferin | продавщица продавщицы продавщице продавщицу продавщицей f
el músico | le musicien | der Musiker | музыкант музыканта музыканту музыканта музыкантом m
la amiga | l'amie f | die Freundin | подруга подруги подруге подругу подругой f
el estudiante | l'étudiant m | der Student Studenten | студент студента студенту студента студентом m
el cartero | le facteur | der Briefträger | почтальон почтальона почтальону почтальона почтальоном m
la pintora | la peintre | die Malerin | художница художницы художнице художницу художницей f
el capitán | le capitaine | der Kapitän | капитан капитана капитану капитана капитаном m
la maestra | la maîtresse | die Lehrerin | учительница учительницы учительнице учительницу учительницей f
la bailarina | la danseuse | die Tänzerin | танцовщица танцовщицы танцовщице танцовщицу танцовщицей f
el carpintero | le menuisier | der Tischler | столяр столяра столяру столяра столяром m
la enfermera | l'infirmière f | die Krankenschwester | медсестра медсестры медсестре медсестру медсестрой f
"""

THINGS = """
el libro libros | le livre livres | das Buch Bücher | книга книгу книги книгой книг f
la carta cartas | la lettre lettres | der Brief Briefe | письмо письмо письма письмом писем n
la lámpara lámparas | la lampe lampes | die Lampe Lampen | лампа лампу лампы лампой ламп f
la llave llaves | la clé clés | der Schlüssel Schlüssel | ключ ключ ключа ключом ключей m
la escoba escobas | le balai balais | der Besen Besen | метла метлу метлы метлой мётел f
el sombrero sombreros | le chapeau chapeaux | der Hut Hüte | шляпа шляпу шляпы шляпой шляп f
la maleta maletas | la valise valises | der Koffer Koffer | чемодан чемодан чемодана чемоданом чемоданов m
el mapa mapas | la carte cartes | die Karte Karten | карта карту карты картой карт f
el paraguas paraguas | le parapluie parapluies | der Regenschirm Regenschirme | зонт зонт зонта зонтом зонтов m
la guitarra guitarras | la guitare guitares | die Gitarre Gitarren | гитара гитару гитары гитарой гитар f
el cuadro cuadros | le tableau tableaux | das Bild Bilder | картина картину картины картиной картин f
la cesta cestas | le panier paniers | der Korb Körbe | корзина корзину корзины корзиной корзин f
el espejo espejos | le miroir miroirs | der Spiegel Spiegel | зеркало зеркало зеркала зеркалом зеркал n
la silla sillas | la chaise chaises | der Stuhl Stühle | стул стул стула стулом стульев m
la taza tazas | la tasse tasses | die Tasse Tassen | чашка чашку чашки чашкой чашек f
el periódico periódicos | le journal journaux | die Zeitung Zeitungen | газета газету газеты газетой газет f
el anillo anillos | la bague bagues | der Ring Ringe | кольцо кольцо кольца кольцом колец n
el billete billetes | le billet billets | die Fahrkarte Fahrkarten | билет билет билета билетом билетов m
la bufanda bufandas | l'écharpe écharpes f | der Schal Schals | шарф шарф шарфа шарфом шарфов m
el cuaderno cuadernos | le cahier cahiers | das Heft Hefte | тетрадь тетрадь тетради тетрадью тетрадей f
el cuchillo cuchillos | le couteau couteaux | das Messer Messer | нож нож ножа ножом ножей m
la caja cajas | la boîte boîtes | die Kiste Kisten | коробка коробку коробки коробкой коробок f
la mesa mesas | la table tables | der Tisch Tische | стол стол стола столом столов m
la foto fotos | la photo photos | das Foto Fotos | снимок снимок снимка снимком снимков m
el tambor tambores | le tambour tambours | die Trommel Trommeln | барабан барабан барабана барабаном барабанов m
la botella botellas | la bouteille bouteilles | die Flasche Flaschen | бутылка бутылку бутылки бутылкой бутылок f
la manta mantas | la couverture couvertures | die Decke Decken | одеяло одеяло одеяла одеялом одеял n
el bolso bolsos | le sac sacs | die Tasche Taschen | сумка сумку сумки сумкой сумок f
"""

FOODS = """
el pan panes | le pain pains | das Brot Brote | хлеб хлеб хлеба хлебом хлебов m
la sopa sopas | la soupe soupes | die Suppe Suppen | суп суп супа супом супов m
la manzana manzanas | la pomme pommes | der Apfel Äpfel | яблоко яблоко яблока яблоком яблок n
el queso quesos | le fromage fromages | der Käse Käse | сыр сыр сыра сыром сыров m
el pastel pasteles | le gâteau gâteaux | der Kuchen Kuchen | пирог пирог пирога пирогом пирогов m
el pescado pescados | le poisson poissons | der Fisch Fische | рыба рыбу рыбы рыбой рыб f
la pera peras | la poire poires | die Birne Birnen | груша грушу груши грушей груш f
el huevo huevos | l'œuf œufs m | das Ei Eier | яйцо яйцо яйца яйцом яиц n
"""

PLACES = """
en el mercado, al mercado | au marché | auf dem Markt, auf den Markt | на рынке, на рынок
en la escuela, a la escuela | à l'école | in der Schule, in die Schule | в школе, в школу
en la estación, a la estación | à la gare | am Bahnhof, zum Bahnhof | на вокзале, на вокзал
en el jardín, al jardín | dans le jardin | im Garten, in den Garten | в саду, в сад
en la cocina, a la cocina | dans la cuisine | in der Küche, in die Küche | на кухне, на кухню
en la torre, a la torre | dans la tour | im Turm, in den Turm | в башне, в башню
en el pueblo, al pueblo | au village | im Dorf, ins Dorf | в деревне, в деревню
en el puerto, al puerto | au port | am Hafen, zum Hafen | в порту, в порт
en el bosque, al bosque | dans la forêt | im Wald, in den Wald | в лесу, в лес
junto al río, al río | au bord de la rivière | am Fluss, zum Fluss | у реки, к реке
en el museo, al museo | au musée | im Museum, ins Museum | в музее, в музей
en la plaza, a la plaza | sur la place | auf dem Platz, auf den Platz | на площади, на площадь
en la iglesia, a la iglesia | à l'église | in der Kirche, in die Kirche | в церкви, в церковь
en el hospital, al hospital | à l'hôpital | im Krankenhaus, ins Krankenhaus | в больнице, в больницу
en el parque, al parque | au parc | im Park, in den Park | в парке, в парк
en el teatro, al teatro | au théâtre | im Theater, ins Theater | в театре, в театр
en la panadería, a la panadería | à la boulangerie | in der Bäckerei, in die Bäckerei | в булочной, в булочную
en el puente, al puente | sur le pont | auf der Brücke, auf die Brücke | на мосту, на мост
en la montaña, a la montaña | à la montagne | in den Bergen, in die Berge | в горах, в горы
en el taller, al taller | à l'atelier | in der Werkstatt, in die Werkstatt | в мастерской, в мастерскую
en la playa, a la playa | à la plage | am Strand, an den Strand | на пляже, на пляж
en la isla, a la isla | sur l'île | auf der Insel, auf die Insel | на острове, на остров
"""

TIMES = """
Ayer | Hier | Gestern | Вчера
Esta mañana | Ce matin | Heute Morgen | Сегодня утром
El lunes | Lundi | Am Montag | В понедельник
El martes | Mardi | Am Dienstag | Во вторник
El miércoles | Mercredi | Am Mittwoch | В среду
El jueves | Jeudi | Am Donnerstag | В четверг
El viernes | Vendredi | Am Freitag | В пятницу
El sábado | Samedi | Am Samstag | В субботу
El domingo | Dimanche | Am Sonntag | В воскресенье
Por la noche | Le soir | Am Abend | Вечером
Después de comer | Après le déjeuner | Nach dem Essen | После обеда
A las ocho | À huit heures | Um acht Uhr | В восемь часов
La semana pasada | La semaine dernière | Letzte Woche | На прошлой неделе
El invierno pasado | L'hiver dernier | Letzten Winter | Прошлой зимой
El verano pasado | L'été dernier | Letzten Sommer | Прошлым летом
Un día | Un jour | Eines Tages | Однажды
"""

LINKS = """
Luego | Ensuite | Dann | Потом
Al final | Finalement | Schließlich | В конце концов
De repente | Soudain | Plötzlich | Вдруг
Dos días después | Deux jours plus tard | Zwei Tage später | Через два дня
Una hora más tarde | Une heure plus tard | Eine Stunde später | Через час
Al día siguiente | Le lendemain | Am nächsten Tag | На следующий день
"""

ACTS = """
encontró | a trouvé | fand | ?нашёл/нашла
compró | a acheté | kaufte | ?купил/купила
perdió | a perdu | verlor | ?потерял/потеряла
vendió | a vendu | verkaufte | ?продал/продала
olvidó | a oublié | vergaß | ?забыл/забыла
dibujó | a dessiné | zeichnete | ?нарисовал/нарисовала
reparó | a réparé | reparierte | ?починил/починила
escondió | a caché | versteckte | ?спрятал/спрятала
buscó | a cherché | suchte | ?искал/искала
vio | a vu | sah | ?увидел/увидела
limpió | a nettoyé | putzte | ?почистил/почистила
robó | a volé | stahl | ?украл/украла
"""

WISHES = """
comprar | acheter | kaufen | купить
vender | vendre | verkaufen | продать
encontrar | trouver | finden | найти
reparar | réparer | reparieren | починить
ver | voir | sehen | увидеть
dibujar | dessiner | zeichnen | нарисовать
llevar | emporter | mitnehmen | взять с собой
"""

COMPANY = """
habló | a parlé | sprach | ?говорил/говорила
bailó | a dansé | tanzte | ?танцевал/танцевала
trabajó | a travaillé | arbeitete | ?работал/работала
cantó | a chanté | sang | ?пел/пела
jugó | a joué | spielte | ?играл/играла
desayunó | a pris le petit déjeuner | frühstückte | ?завтракал/завтракала
"""

MOODS = """
estaba ?contento/contenta | était ?content/contente | war froh | ?был рад/была рада
estaba ?sorprendido/sorprendida | était ?surpris/surprise | war überrascht | ?был удивлён/была удивлена
estaba muy ?ocupado/ocupada | était très ?occupé/occupée | war sehr beschäftigt | ?был очень занят/была очень занята
tenía hambre | avait faim | hatte Hunger | ?был голоден/была голодна
tenía miedo | avait peur | hatte Angst | ?боялся/боялась
tenía razón | avait raison | hatte recht | ?был прав/была права
estaba ?cansado/cansada | était ?fatigué/fatiguée | war müde | ?устал/устала
estaba ?enfermo/enferma | était malade | war krank | ?был болен/была больна
"""

QUALITIES = """
?viejo/vieja | ?vieux/vieille | alt | ?старым/старой/старым
?nuevo/nueva | ?neuf/neuve | neu | ?новым/новой/новым
?pesado/pesada | ?lourd/lourde | schwer | ?тяжёлым/тяжёлой/тяжёлым
?hermoso/hermosa | ?beau/belle | schön | ?красивым/красивой/красивым
?pequeño/pequeña | ?petit/petite | klein | ?маленьким/маленькой/маленьким
?caro/cara | ?cher/chère | teuer | ?дорогим/дорогой/дорогим
?rojo/roja | rouge | rot | ?красным/красной/красным
?extraño/extraña | étrange | seltsam | ?странным/странной/странным
?blanco/blanca | ?blanc/blanche | weiß | ?белым/белой/белым
útil | utile | nützlich | ?полезным/полезной/полезным
"""

REASONS = """
llovía | il pleuvait | es regnete | шёл дождь
nevaba | il neigeait | es schneite | шёл снег
era tarde | il était tard | es spät war | было поздно
hacía frío | il faisait froid | es kalt war | было холодно
estaba oscuro | il faisait nuit | es dunkel war | было темно
hacía mucho calor | il faisait très chaud | es sehr heiß war | было очень жарко
"""

NUMBERS = """
dos | deux | zwei | ?два/две/два
tres | trois | drei | три
cuatro | quatre | vier | четыре
cinco | cinq | fünf | пять
seis | six | sechs | шесть
siete | sept | sieben | семь
ocho | huit | acht | восемь
nueve | neuf | neun | девять
"""

SCENERY = """
Llovía desde la mañana. | Il pleuvait depuis le matin. | Es regnete seit dem Morgen. | С утра шёл дождь.
El cielo estaba azul. | Le ciel était bleu. | Der Himmel war blau. | Небо было голубое.
Había mucha niebla. | Il y avait beaucoup de brouillard. | Es war sehr neblig. | Был густой туман.
Las calles estaban vacías. | Les rues étaient vides. | Die Straßen waren leer. | Улицы были пусты.
El viento soplaba del norte. | Le vent soufflait du nord. | Der Wind wehte von Norden. | Дул северный ветер.
Los pájaros cantaban. | Les oiseaux chantaient. | Die Vögel sangen. | Пели птицы.
La nieve cubría los tejados. | La neige couvrait les toits. | Der Schnee bedeckte die Dächer. | Снег лежал на крышах.
El sol brillaba. | Le soleil brillait. | Die Sonne schien. | Светило солнце.
Las campanas sonaban. | Les cloches sonnaient. | Die Glocken läuteten. | Звонили колокола.
Era un día tranquilo. | C'était une journée tranquille. | Es war ein ruhiger Tag. | Это был спокойный день.
Todo el mundo dormía. | Tout le monde dormait. | Alle schliefen. | Все спали.
La luna estaba llena. | La lune était pleine. | Es war Vollmond. | Было полнолуние.
"""

ENDINGS = """
Así terminó el día. | Ainsi se termina la journée. | So endete der Tag. | Так закончился день.
Nadie dijo nada. | Personne n'a rien dit. | Niemand sagte etwas. | Никто ничего не сказал.
Todos se rieron. | Tout le monde a ri. | Alle lachten. | Все засмеялись.
Mañana será otro día. | Demain est un autre jour. | Morgen ist ein neuer Tag. | Завтра будет новый день.
Y eso fue todo. | Et ce fut tout. | Und das war alles. | Вот и всё.
Nadie lo ha olvidado. | Personne ne l'a oublié. | Niemand hat es vergessen. | Никто этого не забыл.
La vida es así. | C'est la vie. | So ist das Leben. | Такова жизнь.
"""
