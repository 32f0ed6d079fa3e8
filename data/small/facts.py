"""What the small suite is about: closed vocabularies, and facts about the objects of its pictures."""

COLORS = {
    "red": (214, 40, 40),
    "blue": (38, 84, 200),
    "green": (40, 150, 70),
    "yellow": (245, 200, 30),
    "purple": (130, 60, 170),
    "gray": (120, 120, 120),
}
SIGNS = (
    "bank bar bus cafe exit fire gas help hotel left market open park police pull push sale school shop slow".split()
)
SIGNS += "stop taxi wait zoo".split()
PRODUCTS = "beans cocoa coffee corn honey jam juice lemon milk oil rice salt soap soda sugar tea".split()

# {object: (icon, {kind of question: answer})}. An icon is a name in the Iconify sets of data/small/pictures.py.
OBJECTS = {
    "cow": ("cow-face", {"eats": "grass", "lives": "farm", "legs": "4", "flies": "no"}),
    "horse": ("horse-face", {"eats": "hay", "lives": "farm", "legs": "4", "flies": "no"}),
    "lion": ("lion", {"eats": "meat", "lives": "savanna", "legs": "4", "flies": "no"}),
    "tiger": ("tiger-face", {"eats": "meat", "lives": "jungle", "legs": "4", "flies": "no"}),
    "elephant": ("elephant", {"eats": "leaves", "lives": "savanna", "legs": "4", "flies": "no"}),
    "panda": ("panda", {"eats": "bamboo", "lives": "forest", "legs": "4", "flies": "no"}),
    "koala": ("koala", {"eats": "leaves", "lives": "forest", "legs": "4", "flies": "no"}),
    "rabbit": ("rabbit-face", {"eats": "carrots", "lives": "field", "legs": "4", "flies": "no"}),
    "monkey": ("monkey", {"eats": "bananas", "lives": "jungle", "legs": "2", "flies": "no"}),
    "camel": ("camel", {"eats": "hay", "lives": "desert", "legs": "4", "flies": "no"}),
    "penguin": ("penguin", {"eats": "fish", "lives": "ice", "legs": "2", "flies": "no"}),
    "shark": ("shark", {"eats": "fish", "lives": "sea", "legs": "0", "flies": "no"}),
    "octopus": ("octopus", {"eats": "crabs", "lives": "sea", "legs": "8", "flies": "no"}),
    "frog": ("frog", {"eats": "flies", "lives": "pond", "legs": "4", "flies": "no"}),
    "duck": ("duck", {"eats": "seeds", "lives": "pond", "legs": "2", "flies": "yes"}),
    "bee": ("honeybee", {"eats": "nectar", "lives": "hive", "legs": "6", "flies": "yes"}),
    "butterfly": ("butterfly", {"eats": "nectar", "lives": "field", "legs": "6", "flies": "yes"}),
    "owl": ("owl", {"eats": "mice", "lives": "forest", "legs": "2", "flies": "yes"}),
    "snake": ("snake", {"eats": "mice", "lives": "desert", "legs": "0", "flies": "no"}),
    "spider": ("spider", {"eats": "flies", "lives": "web", "legs": "8", "flies": "no"}),
    "hammer": ("hammer", {"used": "building"}),
    "scissors": ("scissors", {"used": "cutting"}),
    "knife": ("kitchen-knife", {"used": "cutting"}),
    "pencil": ("pencil", {"used": "writing"}),
    "broom": ("broom", {"used": "cleaning"}),
    "umbrella": ("umbrella", {"used": "rain"}),
    "camera": ("camera", {"used": "photos"}),
    "guitar": ("guitar", {"used": "music"}),
    "drum": ("drum", {"used": "music"}),
    "bed": ("bed", {"used": "sleeping"}),
    "telescope": ("telescope", {"used": "stars"}),
    "airplane": ("airplane", {"travels": "sky"}),
    "ship": ("ship", {"travels": "water"}),
    "car": ("automobile", {"travels": "road"}),
    "bicycle": ("bicycle", {"travels": "road"}),
    "rocket": ("rocket", {"travels": "space"}),
    "grapes": ("grapes", {"made": "wine", "grows": "vine"}),
    "lemon": ("lemon", {"made": "juice", "grows": "tree"}),
    "carrot": ("carrot", {"made": "soup", "grows": "ground"}),
    "corn": ("ear-of-corn", {"made": "popcorn", "grows": "field"}),
}
KNOWLEDGE = {
    "eats": ["what does this animal eat?", "what is the food of this animal?"],
    "lives": ["where does this animal live?", "what is the home of this animal?"],
    "legs": ["how many legs does this animal have?"],
    "flies": ["can this animal fly?"],
    "used": ["what is this used for?", "what do people use this for?"],
    "travels": ["where does this vehicle travel?", "where is this vehicle used?"],
    "made": ["what is made from this plant?", "what do people make from this plant?"],
    "grows": ["where does this plant grow?"],
}
