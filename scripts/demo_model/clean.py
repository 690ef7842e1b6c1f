"""Turns chat-room messages into plain sentences, and refuses those that are not fit to learn from.

The conversations of chitchat-dataset were typed by students of one university to strangers.
A message is refused if it is vulgar, on a subject that a toy must not improvise on (death, drugs,
faith, politics, sexuality, illness), could point to a person or to where they live, or is about the
chat room itself. The conversation is cut there and its clean stretches are kept.
"""

from __future__ import annotations

import re

MAX_CHARS = 400  # longer messages are mostly pasted text

_VULGAR = r"""
    \w*f+u+c+k\w* fk fck fuk wtf stfu \w*shit\w* sh\*t bullsh\w* \w*bitch\w* b\*tch bastards?
    asshole\w* ass dumbass badass jackass arse cunts? dick dicks dickhead cocks? piss\w* crap
    crappy damn\w* goddamn\w* dammit hell sucks? whor\w* slut\w* prostitut\w* sex\w* porn\w*
    nud\w* naked boobs? tits? titties penis\w* vagina\w* horny orgasm\w* masturbat\w* erection
    condoms? kinky fetish\w* strippers? rap(?:e|ed|ing|ist) molest\w* incest nigg\w* fag fags
    faggot\w* retard\w* dyke tranny boner douche\w* turd poop\w* pee peeing fart\w* butts?
    screwed moron\w* idiot\w* stupid dumb creepy pervert\w* virgin\w* breasts? bra panties
    underwear thong lmao\w* lmfao omfg milf
"""
_TOO_HEAVY = r"""
    suicid\w* kill\w* murder\w* dead die dying died death bomb\w* terroris\w* guns? shooting
    drugs? weed cocaine meth heroin marijuana drunk make\sout hookup hook\sup abus\w*
    abortion\w* pregnan\w* depress\w* anxiety therap\w* divorc\w* cancer nazi\w* hitler
    holocaust genocide kkk slav(?:e|es|ery) racis\w* sexis\w* feminis\w* gay\w* lesbian\w*
    lgbt\w* trump\w* obama clinton hillary republican\w* democrat\w* politic\w* immigra\w*
    jew\w* muslim\w* islam\w* satan\w* devil
"""
_PERSONAL = r"""
    byu\w* byui utah provo orem idaho rexburg salt\slake slc mormon\w* lds church\w* mission
    missionar\w* temple ward bishop prophet\w* scripture\w* god jesus christ\w* bible gospel
    pray\w* pathway elder phone snap\w* insta\w* facebook twitter tinder email gmail whatsapp
    skype discord address apartment dorm\w* my\sname name'?s nicknam\w* call\sme years?\sold
    birthday born boyfriend girlfriend fianc\w* wife husband date dating dates single married
    marriage marry cute hot sexy kiss\w* crush flirt\w* hang\sout meet\sup i'?m\sfrom
    i\sam\sfrom from\shere i\slive i\sgrew\sup hometown where\sare\syou\sfrom
    where\sdo\syou\slive my\s(?:mom|dad|mother|father|brother|sister|roommate)'?s\sname
"""
_ABOUT_THE_CHAT = r"""
    is\sany(?:one|body) anyone\s(?:there|here) anybody\s(?:there|here)
    are\syou\s(?:still\s)?(?:there|here) still\sthere you\sthere chit\w* chat\w* leaderboard
    rank\w* ratings? rated points prompts? disconnect\w* connected glitch\w* extra\scredit
    turing dr\.? professor cs\s?\d* competition contest gift\scard prize prizes scores?
    conversations? messages? typing typed respond\w* repl(?:y|ies|ied) bot bots robot app
    website refresh\w* timer same\sperson talked\sbefore top\sten gotta\sgo bye goodbye \w*ttyl
"""
_FIRST_NAMES = """
    adam aaron abby alex alexa alexis allison amanda amber amy andrew angela anna ashley austin
    becca ben benjamin beth brad brandon brian brittany caleb cameron carlos carter catherine
    charlie chelsea chris christian christina christopher claire cody connor courtney daniel
    danielle dave david derek diego dylan elizabeth emily emma eric erica erin ethan evan
    garrett george greg hannah heather isaac jack jackson jacob jake james jamie jared jasmine
    jason jeff jen jenna jennifer jenny jeremy jess jesse jessica jim joe joel john johnny jon
    jonathan jordan jose joseph josh joshua juan julia julie justin kaitlyn karen kate katherine
    katie kayla keith kelly kelsey kenny kevin kim kimberly kristen kyle laura lauren leah
    lindsay lisa logan lucas luke madison maria mark mary matt matthew megan melissa michael
    michelle miguel mike mitchell molly morgan nancy natalie nate nathan nicholas nick nicole
    noah olivia parker patrick paul peter rachel rebecca richard rob robert ron ryan sam
    samantha samuel sara sarah savannah scott sean sergio seth shelby spencer stephanie stephen
    steve steven susan tanner taylor thomas tim timothy todd tom tony travis trevor tyler
    vanessa victoria whitney will william zach zachary
"""


def _words_pattern(block: str) -> str:
    return r"\b(?:" + "|".join(block.split()) + r")\b"


_REFUSED = re.compile(
    "|".join(map(_words_pattern, (_VULGAR, _TOO_HEAVY, _PERSONAL, _ABOUT_THE_CHAT))), re.IGNORECASE
)
_UNFIT = re.compile("|".join(map(_words_pattern, (_VULGAR, _TOO_HEAVY))), re.IGNORECASE)
_NAMES = re.compile(
    r"\b(?:"
    + "|".join(name for name in _FIRST_NAMES.split() if name not in {"will", "mark", "rob"})
    + r")\b",
    re.IGNORECASE,
)
_LINK_OR_NUMBER = re.compile(
    r"https?:|www\.|\.com|\.org|\S@\S|@\w|#\w|\d{4,}|\d{3}[-. ]\d{3}", re.IGNORECASE
)
_NOT_PLAIN = re.compile(r"[^\x20-\x7e]")
_SMILEYS = re.compile(
    r"(?<!\w)[:;=8xX]['^-]?[()\[\]DdPpOo3/\\|*]+|<3|\^_*\^|[-_*~]{2,}|\(:|xD\b|XD\b"
)
_LAUGHS = re.compile(
    r"\b(?:lol+|rofl|haha\w*|ha(?:\sha)+|hehe\w*|ahah\w*|bahah\w*|jaja\w*|um+|uh+|uhm+|hm+)\b[,.!]*\s*",
    re.IGNORECASE,
)
_SPELLINGS = """
    i=I; im=I'm; i'm=I'm; ive=I've; i've=I've; i'd=I'd; i'll=I'll; dont=don't; cant=can't;
    wont=won't; didnt=didn't; doesnt=doesn't; isnt=isn't; wasnt=wasn't; arent=aren't;
    havent=haven't; hasnt=hasn't; couldnt=couldn't; wouldnt=wouldn't; shouldnt=shouldn't;
    thats=that's; whats=what's; hows=how's; theres=there's; youre=you're; youve=you've;
    theyre=they're; hes=he's; shes=she's; lets=let's; u=you; ur=your; r=are; ya=you; yea=yeah;
    cuz=because; bc=because; tho=though; pls=please; plz=please; thx=thanks; ok=okay; k=okay;
    kinda=kind of; wanna=want to; gonna=going to; idk=I don't know; omg=wow; btw=by the way;
    ppl=people; alot=a lot; definately=definitely; favorite=favourite
"""
_FIXES = tuple(
    (re.compile(rf"\b{wrong}\b", re.IGNORECASE), right)
    for wrong, right in (fix.split("=") for fix in " ".join(_SPELLINGS.split()).split("; "))
)


def is_vulgar_or_heavy(text: str) -> bool:
    """Whether a text is vulgar or about what the demo must not improvise about."""
    return bool(_UNFIT.search(text))


def is_refused(text: str) -> bool:
    """Whether not to learn from a message: unfit, personal, about the chat room, not plain."""
    return bool(
        not text
        or len(text) > MAX_CHARS
        or _NOT_PLAIN.search(text)
        or _LINK_OR_NUMBER.search(text)
        or _REFUSED.search(text)
        or _NAMES.search(text)
    )


def to_plain_ascii(text: str) -> str:
    """Typographic quotes and dashes as ASCII, so that one thing has one spelling."""
    return text.translate(
        str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
    )


def _sentence_case(text: str) -> str:
    text = re.sub(r"(^|[.!?]\s+)([a-z])", lambda match: match[1] + match[2].upper(), text)
    return text if text[-1] in ".!?" else text.rstrip(",;:- ") + "."


def tidy(text: str) -> str:
    """One utterance as a sentence: capitals, full stop, contractions, no laughter or smileys."""
    text = _SMILEYS.sub(" ", to_plain_ascii(text))
    text = _LAUGHS.sub("", text)
    if text.isupper() and len(text) > 4:
        text = text.lower()
    for pattern, right in _FIXES:
        text = pattern.sub(right, text)
    text = re.sub(r"([!?])[!?.]+", r"\1", text)
    text = re.sub(r"\.{2,}", ".", text)
    text = re.sub(r"(.)\1{3,}", r"\1\1", text)
    text = re.sub(r"\s+([,.!?])", r"\1", " ".join(text.split())).strip(" ,;:-*.\\")
    return _sentence_case(text) if re.search(r"[A-Za-z]", text) else ""


def join_utterances(utterances: list[str]) -> str:
    """What one person sent in a row, as one message; "" where any of it is refused."""
    if any(is_refused(to_plain_ascii(utterance)) for utterance in utterances):
        return ""
    return " ".join(filter(None, (tidy(utterance) for utterance in utterances)))
