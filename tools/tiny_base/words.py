"""Word facts written for this course and checked by hand: opposites and plurals.

Each line is a pair. No word stands in two pairs of `OPPOSITES`, so that every question has
one answer; only nouns with one accepted plural, and none of `OPPOSITES`, are in `PLURALS`.
"""


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split() for pair in text.replace("\n", "").split(",") if pair.strip())


OPPOSITES = _pairs("""
hot cold,big small,tall short,fast slow,happy sad,old young,hard soft,light dark,open closed,
early late,full empty,rich poor,strong weak,loud quiet,clean dirty,wet dry,thick thin,
deep shallow,wide narrow,high low,near far,sharp blunt,smooth rough,sweet sour,brave cowardly,
cheap expensive,easy difficult,front back,inside outside,top bottom,up down,day night,
summer winter,morning evening,love hate,peace war,win lose,buy sell,push pull,give take,
come go,start finish,laugh cry,remember forget,arrive depart,accept refuse,attack defend,
build destroy,lend borrow,float sink,increase decrease,rise fall,live die,teach learn,
question answer,friend enemy,hero villain,male female,entrance exit,success failure,
victory defeat,truth lie,wisdom folly,hope despair,always never,many few,more less,above below,
before after,first last,true false,safe dangerous,simple complex,polite rude,generous selfish,
calm nervous,lazy hardworking,modern outdated,public private,real fake,solid liquid,
tight loose,visible hidden,alive dead,awake asleep,beautiful ugly,careful careless,common rare,
freeze melt,attract repel,maximum minimum,ally opponent,guilty innocent,import export,
mountain valley,optimist pessimist,vertical horizontal,temporary permanent,straight crooked,
ceiling floor,major minor,odd even,absent present,ancestor descendant,arrogant humble,
bless curse,bitter mild,bold timid,create demolish,debtor creditor,divide unite,expand contract,
feast famine,fertile barren,fresh stale,gain loss,giant dwarf,host guest,idle busy,
inhale exhale,joy sorrow,junior senior,knowledge ignorance,leader follower,lengthen shorten,
lock unlock,merciful cruel,natural artificial,obey rebel,permit forbid,plentiful scarce,
praise blame,pride shame,profit deficit,reward punishment,rigid flexible,sane insane,
spend save,stingy lavish,surface depth,tame wild,thaw solidify,transparent opaque,
urban rural,vacant occupied,vague precise,wax wane,whisper shout,wholesale retail,zenith nadir
""")

PLURALS = _pairs("""
child children,man men,woman women,mouse mice,goose geese,foot feet,tooth teeth,ox oxen,
leaf leaves,knife knives,wolf wolves,life lives,wife wives,half halves,shelf shelves,
thief thieves,loaf loaves,calf calves,elf elves,sheep sheep,deer deer,box boxes,
bus buses,glass glasses,dish dishes,watch watches,church churches,city cities,baby babies,
lady ladies,party parties,story stories,country countries,berry berries,fly flies,boy boys,
key keys,toy toys,potato potatoes,tomato tomatoes,echo echoes,piano pianos,
photo photos,cat cats,dog dogs,tree trees,house houses,car cars,book books,table tables,
chair chairs,river rivers,bridge bridges,apple apples,orange oranges,brush brushes,fox foxes,
tax taxes,class classes,kiss kisses,beach beaches,lunch lunches,army armies,family families,
factory factories,puppy puppies,bird birds,flower flowers,garden gardens,window windows,
door doors,teacher teachers,student students,doctor doctors,farmer farmers,lion lions,
tiger tigers,horse horses,cow cows,bee bees,ant ants,spider spiders,train trains,plane planes,
ship ships,road roads,street streets,analysis analyses,crisis crises,thesis theses,
radius radii,nucleus nuclei,bacterium bacteria,criterion criteria,person people,penny pennies,
library libraries,battery batteries,diary diaries,fairy fairies,jelly jellies,pony ponies,
cherry cherries,lorry lorries,daisy daisies,bench benches,inch inches,match matches,
patch patches,peach peaches,sandwich sandwiches,witch witches,wish wishes,bush bushes,
monkey monkeys,donkey donkeys,valley valleys,chimney chimneys,journey journeys,alley alleys,
hypothesis hypotheses,oasis oases,parenthesis parentheses,louse lice,veto vetoes,torpedo torpedoes,
kangaroo kangaroos,studio studios,radio radios,video videos,cliff cliffs,roof roofs,chef chefs,
belief beliefs,proof proofs,eyelash eyelashes,compass compasses,actress actresses,
mattress mattresses,hunter hunters,painter painters,rabbit rabbits,candle candles,bottle bottles,
camel camels,ladder ladders,hammer hammers,basket baskets,carpet carpets,pencil pencils,
lawyer lawyers
""")
