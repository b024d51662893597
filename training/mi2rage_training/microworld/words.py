"""The micro-world's words. What carries meaning is shared by all splits; names and sentence frames are not."""

from __future__ import annotations

__all__ = [
    "CLOSERS",
    "COLORS",
    "CUE_WORDS",
    "EVERYDAY_TAGS",
    "HINTS",
    "OPENERS",
    "PHRASES",
    "SETTINGS",
    "SETTING_WORDS",
    "SPLITS",
]

SPLITS: tuple[str, ...] = ("train", "validation", "test", "corpus")
"""The three splits of a world, and the pretraining corpus; no two share names, frames or scenes."""

COLORS: tuple[str, ...] = ("red", "blue", "green", "yellow", "white", "black")
"""Shirt colours."""

SETTINGS: tuple[str, ...] = ("street", "park", "beach", "night", "room")

SETTING_WORDS: dict[str, tuple[str, ...]] = {
    "street": ("on the street", "in the street"),
    "park": ("in the park", "on the grass of a park"),
    "beach": ("on the beach", "at the beach"),
    "night": ("at night", "in the night"),
    "room": ("in a room", "inside a room"),
}

CUE_WORDS: dict[str, tuple[str, ...]] = {
    "heart": ("a heart", "a big heart"),
    "ball": ("a ball", "a round ball"),
    "trophy": ("a trophy", "a gold trophy"),
    "house": ("a house", "a small house"),
    "stage": ("a stage", "a lit stage"),
    "tower": ("a tower", "a tall tower"),
    "cake": ("a cake", "a cake with candles"),
    "flag": ("a flag", "a waving flag"),
}

PHRASES: dict[str, tuple[str, ...]] = {
    "close": (
        "{h} w/ {t}",
        "{h} and {t}",
        "{h} x {t}",
        "{h} alongside {t}",
        "{h} together with {t}",
        "{t} , and {h} right there",
        "{h} heading to {t}",
        "{h} back to {t}",
        "{h} visits {t}",
        "{h} finds {t}",
        "{h} running to {t}",
        "{t} waiting for {h}",
    ),
    "about": (
        "{h} talks about {t}",
        "{h} on {t}",
        "{h} thinking about {t}",
        "{h} misses {t}",
        "{h} still not over {t}",
        "what {h} said of {t}",
    ),
}
"""Linking phrases by family; `{h}` and `{t}` stand for head and tail."""

HINTS: dict[str, tuple[str, ...]] = {
    "heart": ("#love", "#bae", "so cute", "<3", "#datenight", "#goals", "crushin hard", "xoxo"),
    "ball": (
        "#gameday",
        "#matchday",
        "what a goal",
        "#hattrick",
        "kickoff soon",
        "#playoffs",
        "nice pass",
        "#teamwork",
    ),
    "trophy": ("#champs", "#winning", "well deserved", "#podium", "so proud", "#gold", "took it home", "#legend"),
    "house": (
        "#homesweethome",
        "#cozy",
        "movin in",
        "#newplace",
        "door is open",
        "#backyard",
        "#neighbors",
        "front porch",
    ),
    "stage": ("#live", "#onstage", "encore pls", "front row", "#soldout", "#tourlife", "turn it up", "#setlist"),
    "tower": ("#skyline", "#views", "#downtown", "up so high", "#cityscape", "#landmark", "way up there", "#rooftop"),
    "cake": (
        "#bday",
        "#party",
        "another yr older",
        "#cheers",
        "make a wish",
        "#sweettooth",
        "save me a slice",
        "#blessed",
    ),
    "flag": ("#parade", "#anthem", "#colors", "stand up", "#represent", "march on", "#national", "salute"),
}
"""Slang and hashtags that go, weakly, with a cue."""

EVERYDAY_TAGS: tuple[str, ...] = (
    "#tbt",
    "#lol",
    "#smh",
    "#mood",
    "#news",
    "#wow",
    "omg",
    "tho",
    "rn",
    "fr",
    "#nofilter",
    "#today",
)
"""What says nothing of the picture."""

OPENERS: dict[str, tuple[str, ...]] = {
    "train": (
        "",
        "RT @{u} :",
        "ok so",
        "breaking :",
        "can we talk ?",
        "RT @{u} : guys ,",
        "this just in :",
        "my feed today :",
        "not me crying over",
        "just saw",
        "friends ,",
        "look :",
        "@{u} so this is",
    ),
    "validation": (
        "well well ,",
        "RT @{u} : hello ?",
        "photo :",
        "@{u} check this out :",
        "told you ,",
        "somebody explain :",
        "RT @{u} : again ,",
        "via @{u} :",
    ),
    "test": (
        "RT @{u} : wait ,",
        "good morning to",
        "hey @{u} ,",
        "spotted :",
        "no words for",
        "RT @{u} : big one :",
        "update :",
        "yo ,",
        "everyone stop :",
        "pic of the day :",
        "RT @{u} | ",
    ),
    "corpus": (
        "RT @{u} : yes ,",
        "lmk what you think :",
        "today :",
        "RT @{u} -",
        "here is",
        "@{u} @{v} remember",
        "so happy :",
        "old pic :",
        "whoa ,",
        "RT @{u} : people ,",
        "new :",
        "they got",
        "never forget",
        "cc @{u} :",
        "story time :",
    ),
}
"""What stands before the linking phrase; `{u}` and `{v}` are user names of the split."""

CLOSERS: dict[str, tuple[str, ...]] = {
    "train": (
        "",
        "!",
        "tonight",
        "this week .",
        "and i cannot even",
        "lol ok",
        "http://t.co/{c}",
        ". thoughts ?",
        "in one picture",
        "!!!",
        ", as you do",
        "( again )",
        "- more soon",
    ),
    "validation": (
        ". wow",
        "this year",
        "? really ?",
        "https://t.co/{c} !",
        ", who knew",
        "on a monday",
        "via my phone",
        ". that is all",
    ),
    "test": (
        "today !",
        ". no comment",
        "this summer",
        ", for real",
        "pic.twitter.com/{c}",
        "? asking for a friend",
        "last week",
        ". big if true",
        "- full story",
        "yesterday .",
        "( sound on )",
    ),
    "corpus": (
        "now .",
        "http://bit.ly/{c}",
        "!!",
        "earlier .",
        ", no joke",
        "? yes",
        "this morning",
        "- via @{v}",
        ". just saying",
        "forever",
        ". photo below",
        "( 1/2 )",
        "at last",
        "..",
        ". you saw it here",
    ),
}
"""What stands after it; `{c}` is a short random code."""
