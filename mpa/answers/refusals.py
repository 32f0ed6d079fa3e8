"""Detect replies that decline to answer: `is_refusal(text)`. Such annotations would train the S-VLM to decline.

The patterns are conservative: "none", "nothing", "no", "0" and a title such as "I Can't Get No Satisfaction" are answers.
"""

import re

_SEEN = "visible|shown|specified|mentioned|provided|given|available|legible|readable|clear|stated|known|determinable"
_SEEN += "|identifiable|discernible|indicated|depicted|answerable|determined|recogni[sz]able"
_FOUND = "determined|seen|read|identified|answered|made out|confirmed|inferred|known|verified|discerned|recogni[sz]ed"
_FIND = "tell|say|see|read|determine|answer|identify|make out|discern|know|recogni[sz]e"
_DO = f"{_FIND}|provide|assist|help|find|view|generate|create|comply|fulfil|access|verify|confirm|describe|interpret"
_DO += "|infer|understand|locate|extract|give|write|process|analy[sz]e|be (?:sure|certain)|have (?:enough|any|access|the|a)"
_CANNOT = "(?:can ?(?:no|'|)t|could(?:n't| not)|(?:am|are|is|was|were|'m|'re) (?:not able|unable) to|do(?:n't| not)|did(?:n't| not))"
_WHERE = "in|on|from|at|of|due|because|as|since|within|for|here|anywhere|enough|to|based|what|which|who|whether|if|how|where|when|why"

# One pattern per line. These must match the whole answer:
_WHOLE = rf"""
unknown|un ?answer(?:able|ed)|(?:#?n/a|n\.a)|not applicable|no (?:answer|idea|clue)|idk|dunno|illegible|unsure|inconclusive
(?:(?:it|this|that)(?:'s| is) )?(?:un|in|not )(?:clear|determined|determinable|determinate|identifiable|identified|specified|certain|readable|available)
(?:{_CANNOT} )(?:{_FIND})(?: (?:it|that|this))?
no (?:visible |legible |readable |relevant |such )?(?:info|information|data|text|context|details?)(?: (?:is |are )?(?:{_SEEN}))?
no (?:visible|legible|readable) \w+
(?:the )?(?:information|data|answer|text|image|question) (?:is )?(?:not (?:{_SEEN})|unavailable|missing|unclear|unknown|illegible|unanswerable)
"""
# These must match at the start:
_START = rf"""
(?:i'm |i am |we are )?(?:very |so |terribly )?sorry(?:$|[,.;:!]| but\b| i\b| for\b)|i apologi[sz]e|(?:my )?apologies\b|unfortunately\b
as an? (?:ai|a\.i\.|(?:large )?language model|assistant|artificial)\b|i(?:'m| am) (?:just |only )?an? (?:ai|language model)\b
(?:i|we|you|one)(?: \w+ly| just)? ?{_CANNOT} (?:\w+ly |really |be able to )?(?:{_DO})\b
(?:can ?(?:no|'|)t|could(?:n't| not)) (?:{_FIND}|be (?:{_FOUND}))\b.{{0,40}} (?:{_WHERE}|the|it|this)\b
(?:i'm|i am|i was|we're|we are) (?:not (?:sure|certain)|unsure|uncertain)\b|unable to (?:{_DO})\b
(?:(?:it|this|that)(?:'s| is| was) )?(?:not possible|impossible|hard|difficult|too (?:hard|difficult)|unclear|not clear|uncertain)(?: for me)? (?:to (?:{_FIND})\b|(?:{_WHERE})\b)
(?:there(?:'s| is| are| isn't| is not) )?(?:not enough|insufficient|not sufficient|no) (?:info|information|context|details?|data|evidence)(?:$| (?:{_WHERE}|is|are|about|{_SEEN})\b)
not (?:\w+ly )?(?:{_SEEN}|enough information|sure|certain|possible to (?:{_FIND}))(?:$|[,;.(]| (?:{_WHERE})\b)
too (?:blurry|blurred|small|dark|far|faint|unclear|pixelated|bright)(?: away)?(?: \w+)? to (?:{_FIND}|be)\b
(?:unknown|unclear|unanswerable|unspecified|n/a)(?: ?[,;:.(]| -| (?:{_WHERE})\b)
the (?:\w+ )?(?:image|picture|photo|photograph|chart|graph|figure|question|context|document|text|information)(?: \w+)? (?:does(?:n't| not)|cannot|can't|lacks|fails to) (?:\w+ly )?(?:show|contain|provide|mention|specify|include|give|indicate|state|be|have|display|depict|allow|make|reveal)\b
please (?:provide|upload|share|clarify)\b
"""
# These may match anywhere, unless the answer begins with "because":
_ANYWHERE = rf"""
(?:can ?(?:no|'|)t|could(?:n't| not)) be (?:\w+ly )?(?:{_FOUND})\b
(?:is|are|was|were)(?:n't| not) (?:\w+ly )?(?:{_SEEN})(?:$| (?:in|on|from|due|enough|within|here)\b)
(?:is|are) (?:unknown|unclear|illegible|unreadable|unspecified|unavailable|indeterminate|unanswerable)(?:$| (?:{_WHERE})\b)
"""
# Other languages; these must match at the start:
_OTHERS = """
unbekannt|nicht (?:erkennbar|sichtbar|lesbar|bekannt|ersichtlich|angegeben|bestimmbar|beantwortbar|zu erkennen)|keine (?:angabe|antwort|information|ahnung)
(?:das |ich )?wei(?:ß|ss) (?:ich |es )?nicht|ich kann .{0,60}nicht|kann nicht|(?:es )?tut mir leid|leider|unleserlich|unklar
inconnue?$|je ne (?:sais|peux|vois) pas|(?:non|pas) (?:visible|lisible|disponible|précisé|spécifié|mentionné|déterminé)|illisible|impossible (?:à|de)|désolée?|on ne (?:peut|voit|sait)|il n'est pas possible
desconocid[oa]$|no (?:lo )?sé|no se (?:puede|ve|sabe|aprecia|muestra|menciona|especifica)|no (?:es |está )?(?:visible|legible|disponible)|no puedo|no es posible|lo siento|ilegible
desconhecid[oa]$|não (?:sei|posso|consigo|é possível|é visível|está visível|visível|legível|disponível|dá para|há informa)|desculpe|ilegível
sconosciut[oa]$|non (?:lo )?so\\b|non (?:è|posso|riesco|si può|si vede|visibile|leggibile|disponibile|specificato)|mi dispiace|illeggibile
onbekend$|(?:dat )?weet (?:ik )?niet|ik (?:weet|kan) .{0,40}niet|niet (?:zichtbaar|leesbaar|duidelijk|te (?:zien|lezen|bepalen)|bekend)|onleesbaar|onduidelijk|het spijt me
bilinmiyor|bilmiyorum|belirlenemiyor|belirsiz$|görünmüyor|okunmuyor|üzgünüm|nieznan[yae]$|nie (?:wiem|można|widać|da się|mogę)|niewidoczn|nieczyteln|przepraszam
không (?:biết|rõ|thể|xác định|nhìn thấy|có thông tin)|xin lỗi|tidak (?:diketahui|tahu|terlihat|dapat|jelas|bisa|terbaca)|maaf
неизвестн|не (?:знаю|могу|видно|указан|определен|определён|ясно|удается|удалось|представляется)|невозможно|нельзя (?:определить|сказать|прочитать)|извините|к сожалению|неразборчиво
невідом|не (?:можу|вказано)|неможливо|вибачте|άγνωστο|δεν (?:γνωρίζω|ξέρω|μπορώ|φαίνεται)|okänt$|ukendt$|ukjent$|vet (?:inte|ej|ikke)|kan (?:inte|ikke) (?:se|avgöra|svara|bestemmes)|ei (?:tiedossa|näy|voi)
غير (?:معروف|واضح|مرئي|متوفر|محدد|مذكور|مقروء)|لا (?:أعرف|أعلم|يمكن|أستطيع|يظهر)|آسف|عذرا|نامشخص|نمی.?(?:دانم|توان)|לא (?:ידוע|ניתן|יודע|ברור|נראה)
पता नहीं|मुझे (?:नहीं )?पता|अज्ञात|ज्ञात नहीं|नहीं (?:कहा|पता|बता|दिख)|क्षमा करें|माफ|অজানা|ไม่(?:ทราบ|สามารถ|ชัดเจน|รู้|เห็น|ปรากฏ|ระบุ)|ขออภัย
不知道|不清楚|不[确確]定|不明$|未知|未提[及供]|[无無]法|不能(?:[确確]定|判[断斷]|回答|[识識][别別]|看)|看不[清到出见見]|[没沒]有(?:提供|提到|[显顯]示|足[够夠]|相[关關])|很?抱歉|[对對]不起
(?:わか|分か)(?:りません|らない)|判断でき(?:ません|ない)|読み取れ(?:ません|ない)|特定でき(?:ません|ない)|申し訳|見えません|(?:答え|回答でき)(?:られ)?ません|情報が(?:ありません|不足)|記載なし
알 수 없|모르겠|모릅니다|(?:확인|판단|식별)할 수 없|보이지 않|죄송|불명
"""


def _any(patterns: str) -> str:
    return "|".join(patterns.strip().splitlines())


_WHOLE_ANSWER = re.compile(_any(_WHOLE))
_BEGINNING = re.compile(_any(f"{_START.strip()}\n{_OTHERS.strip()}"))
_WITHIN = re.compile(_any(_ANYWHERE))
_MAX_CHARS = 300  # a refusal says so at its beginning


def is_refusal(text: str) -> bool:
    """Does this text, an answer or a whole reply, decline to answer?

    >>> is_refusal("I cannot determine that."), is_refusal("N/A"), is_refusal("None"), is_refusal("Unknown Pleasures")
    (True, True, False, False)
    """
    text = " ".join(text[:_MAX_CHARS].casefold().translate(str.maketrans("’‘", "''", '*_`"“”')).split())
    text = text.strip(" .!,;:()[]<>。！…-")
    if _WHOLE_ANSWER.fullmatch(text) or _BEGINNING.match(text):
        return True
    return not text.startswith("because") and bool(_WITHIN.search(text))
