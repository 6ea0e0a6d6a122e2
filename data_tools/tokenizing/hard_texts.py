"""Short texts over which tokenizer libraries come to differ: asked before one of them stands in for another.

Knows where text is split and mended: white space, contractions, digits, scripts, marks, controls, added tokens, the
vocabulary's own words. Nothing of any library.
"""

from collections.abc import Iterable, Sequence

_WORDS = (
    "",
    "a",
    "word",
    "Two words",
    "I'm, you're, he'd, we'll, they've, it's, don't. I'M YOU'RE HE'D WE'LL THEY'VE IT'S DON'T",
    "it's'll''re 'tis 's't 'S'T 'Re 'rE 'LL'Ll x'\u017f x'\u212a \u2019s don\u2019t",
    (
        "0 1 12 123 1234 12345 1234567890 3.14159 1,000,000 0x1F 1e-9 v2.0.1 10:30 1/2 \u00bd\u00b2\u00b3 "
        "\u2167 \u0661\u0662\u0663\u0664 \u0967\u0968 \uff11\uff12\uff13\uff14"
    ),
    (
        "CamelCaseWords snake_case_words kebab-case-words SCREAMING_CASE HTTPServer iPhone McDonald "
        "aBC ABc \u01c5\u01c8 \u02b0\u02b1"
    ),
    "a=b+c;d->e;f::g;h!==i&&j||k?l:m<<n>>o **p** __q__ ~~r~~ `s` {t} [u] (v) <w/> </x> $y @z #1 %2 ^3 /*4*/ //5",
    "!!!???...,,,;;;:::---___***///\\\\\\|||\"\"\"'''```$$$###@@@~~~^^^&&&((()))[[[]]]{{{}}}<<<>>>",
    "https://user@example.org:8080/a/b.html?c=d&e=%20f#g mail@example.com C:\\dir\\file.txt ~/.config/x",
    "def f(x):\n    if x:\n        return [1, 2]\n\n\n    # end\n\treturn None\n",
)
_SPACES = (
    *(
        kind * count
        for kind in (" ", "\n", "\t", "\r\n", "\r", "\u00a0", "\u3000")
        for count in (1, 2, 3, 4, 7, 16, 65)
    ),
    *(
        f"a{gap}b"
        for gap in ("  ", "   ", "\t\t", " \n", "\n ", "\n\n  ", "  \n\n", " \t ", "\r\n\r\n", "\n\r", "\u00a0 ")
    ),
    *(f"a{gap}1" for gap in ("  ", "\n", " \n\n ", "\t", "\u2003\u2003")),
    *(f"a{gap}!" for gap in ("  ", "\n", " \n\n ", "\t", "\u2003\u2003")),
    *(
        f"word{end}"
        for end in (" ", "  ", "\n", "\n\n", "\n\n  ", "  \n", "\t\n ", "\r\n", "\r\n  ", " \u00a0", "\u2028", "\x85 ")
    ),
    *(f"{start}word" for start in (" ", "  ", "\n", "\n  ", "  \n", "\t", "\r\n", "\u00a0", "\ufeff", "\u2029")),
    *(
        f"end.{end}Next"
        for end in ("\n", "\n\n", "\r\n\r\n", " \n", "/\n", "\n/", "\r", "\x0b", "\x0c", "\x1c", "\x1f", "\x85")
    ),
    "a\u1680b\u2000c\u2007d\u200be\u202ff\u205fg\u3000h\u2060i\u180ej\ufeffk",
)
_SCRIPTS = (
    (
        "na\u00efve fa\u00e7ade \u0152uvre Stra\u00dfe STRASSE \u1e9e \u0130stanbul \u0131\u015f\u0131k "
        "\u00c5ngstr\u00f6m \u0141\u00f3d\u017a ti\u1ebfng Vi\u1ec7t"
    ),
    (
        "nai\u0308ve fac\u0327ade e\u0301e\u0301 o\u0302\u0323 a\u0300\u0301\u0302\u0303 \u0301 "
        "\u0301x x\u0301 1\u0301 !\u0301 \u20dd \u212b \ufb01 \ufb03 \u01c4"
    ),
    (
        "\u0391\u03b8\u03ae\u03bd\u03b1 \u03c3\u03c2\u03a3 \u041c\u043e\u0441\u043a\u0432\u0430 "
        "\u0439\u0419 \u0438\u0306 \u0587 \u0531\u0540 \u10d7\u10d1\u10d8\u10da\u10d8\u10e1\u10d8 "
        "\u1c97\u1c91"
    ),
    (
        "\u6771\u4eac\u90fd\u306e\u5929\u6c17\u306f\u6674\u308c\u3067\u3059\u3002\u300c\u30c6\u30b9\u30c8\u300d"
        "\uff08\u5168\u89d2\uff09\uff01 \u30ab\u3099 \uff76\uff9e \u3005\u3006\u30fc \u4e00\u4e8c\u4e09 "
        "\U00020000\U0002a6d6"
    ),
    (
        "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab \u4e2d\u6587\u6df7\u5408English\u548c123\u6570\u5b57\uff0c\u6807"
        "\u70b9\u3002\n\u7b2c\u4e8c\u884c"
    ),
    (
        "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u0627\u0644\u0633\u0651\u064e\u0644\u0627\u0645\u064f "
        "\u0640\u0640 \u0644\u0627 \ufdfa \u200f\u202btext\u202c\u200e \u06f1\u06f2\u06f3 \u061f\u060c"
    ),
    (
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u0915\u094d\u200d\u0937 \u0915\u094d\u200c\u0937 "
        "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0f56\u0f7c\u0f51\u0f0b "
        "\u1797\u17b6\u179f\u17b6 \u1019\u103c\u1014\u103a\u1019\u102c"
    ),
    (
        "\U0001f600\U0001f44d\U0001f3fd\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 "
        "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7 \u2764\ufe0f\u200d\U0001f525 1\ufe0f\u20e3 \u263a\ufe0e "
        "\U0001f3f4\U000e0067\U000e0062\U000e007f a\U0001f600b"
    ),
    (
        "\U0001d400\U0001d7d8\U0001d465\u00b2 \u2200x\u2208\u211d: \u2211\u222b\u221e \u2102 \u210c "
        "\u2460\u24b6 \u2776 \U00010330\U00010450 \U00012000 \U00013000 \u00aa\u00ba\u00b5 \u20ac\u00a3\u00a5"
        "\u20bf \u2014\u2013\u2026\u201c\u201d\u00ab\u00bb"
    ),
    (
        "\u0149 \u1fbc \u1f88 \u01f0 \u0390 \u2c00 \ua640 \ua7ae \uab30 \u13a0\uab70 \U00010400\U00010428 "
        "\U0001e900\U0001e922 \U000118a0"
    ),
)
_CONTROLS = (
    "\x00",
    "a\x00b\x00\x00c",
    "".join(map(chr, range(0x20))),
    "\x7f\x80\x81\x84\x86\x8d\x9f",
    "a\x01b\x1bc\x1b[0md\x08e",
    "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u180e\u2061",
    "\ufffd\ufffe\uffff\U0001fffe\U0010ffff \ue000\uf8ff\U000f0000\U00100000",
    (
        "\u00ef\u00bf\u00bd \u00c3\u00a9 \u00e2\u20ac\u2122 \u00ff\u00fe <0x0A> <0xFF> \\x00 \\u0041 "
        "\u0120word\u010a\u0100 \u2581word\u2581 ##word"
    ),
    "&amp;&#10;%0A\\n\\r\\t",
)
_LONG = (
    "a" * 3000,
    "ab" * 1500,
    "aB" * 500,
    "1" * 1000,
    "=" * 700 + "-" * 700,
    " " * 900 + "x",
    "x" + "\n" * 900,
    "\u00e9" * 900,
    "\u6f22" * 900,
    "\U0001f600" * 300,
    "".join(chr(0x61 + index * 7 % 26) for index in range(2000)),
    "ACGT" * 400,
    "0123456789abcdef" * 64,
)
# Where an added token may stand, for it to be found or not.
_AROUND_ADDED = (
    "{0}",
    "a{0}b",
    " {0} ",
    "a {0} b",
    "{0}{0}",
    "\n{0}\n",
    "x  {0}  y",
    "({0})",
    "{0}s",
    "1{0}2",
    "{0:.3}",
)
_ADDED_IN_FULL = 64


def hard_texts(added_tokens: Iterable[str] = ()) -> list[str]:
    """Some hundred texts of a few to a few thousand characters, and each added token in many settings."""
    texts = [*_WORDS, *_SPACES, *_SCRIPTS, *_CONTROLS, *_LONG]
    texts.append("\n".join(texts))
    texts.extend(_every_letter())
    for index, token in enumerate(added_tokens):
        if index < _ADDED_IN_FULL:
            texts.extend(around.format(token) for around in _AROUND_ADDED)
            texts.extend((token.upper(), token.lower(), token[:-1], token[1:], f"{token[:2]} {token[2:]}"))
        else:  # some tokenizers reserve a thousand
            texts.append(f"{token} a{token}b {token}{token}\n")
    return texts


def of_vocabulary(words: Sequence[str], limit: int) -> list[str]:
    """At most `limit` of a vocabulary's words, evenly chosen: those that are text by themselves."""
    whole = [word for word in words if word and "\ufffd" not in word]
    step = max(1, -(-len(whole) // max(1, limit)))
    return whole[::step]


def _every_letter() -> list[str]:
    """The characters of the alphabets in use, each between a letter, a digit and a mark, so that its kind shows."""
    blocks = [(0x21, 0x17F), (0x250, 0x5FF), (0x900, 0x97F), (0xE00, 0xE5F), (0x1E00, 0x20CF), (0x2100, 0x218F)]
    blocks += [(0x3000, 0x30FF), (0xFF00, 0xFFEF), (0x1F300, 0x1F3FF)]
    return [
        "".join(f" {chr(point)}a1{chr(point)}2!{chr(point)},A{chr(point)}" for point in range(start, start + 64))
        for first, last in blocks
        for start in range(first, last, 64)
    ]
