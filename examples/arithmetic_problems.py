"""Arithmetic word problems, with their solutions told in words, in ten languages.

The training script of the demonstration model takes its problems from here, and so does the small task set that ships
with moe-route. The two never meet: the operation and the (unordered) pair of numbers decide on which side a problem
falls, so a held-out sum is in no training text of any language. Run as a script, this file writes the shipped task set:

    python examples/arithmetic_problems.py --out moe_route/data/corpus/arithmetic.tsv

Grammar is kept simple by choice of words rather than by rules: every count is at least three (so always a plural), the
nouns are masculine in Russian and Hindi and of class 9/10 in Swahili, and Arabic counts are written in digits. What
remains (Russian and Arabic noun forms by number, French "de" / "d'", Chinese and Japanese counters, the gender of the
subject) is handled below.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = (
    "eng_Latn",
    "rus_Cyrl",
    "deu_Latn",
    "fra_Latn",
    "jpn_Jpan",
    "zho_Hans",
    "arb_Arab",
    "hin_Deva",
    "ind_Latn",
    "swh_Latn",
)

# Which operation a scenario asks for. The order of the scenarios is the order of the sentences in TEXTS.
SCENARIOS = {"gain": "add", "loss": "subtract", "together": "add", "tables": "multiply", "difference": "subtract"}

# One in HELD_OUT_SHARE (operation, number pair) combinations is kept out of training.
HELD_OUT_SHARE = 4

FEMALE = ("Anna", "Sara", "Maria", "Leila")
MALE = ("Adam", "Daniel", "Omar", "David")
NAMES = FEMALE + MALE
LOCAL_NAMES = {
    "fra_Latn": "Anna Sara Maria Leïla Adam Daniel Omar David",
    "jpn_Jpan": "アンナさん サラさん マリアさん ライラさん アダムさん ダニエルさん オマールさん デイビッドさん",
    "zho_Hans": "安娜 莎拉 玛丽亚 蕾拉 亚当 丹尼尔 奥马尔 大卫",
    "arb_Arab": "آنا سارة ماريا ليلى آدم دانيال عمر ديفيد",
    "hin_Deva": "अन्ना सारा मारिया लैला आदम डैनियल उमर डेविड",
    "ind_Latn": "Anna Sara Maria Laila Adam Daniel Umar David",
    "swh_Latn": "Anna Sara Maria Leila Adamu Danieli Omari Daudi",
    "rus_Cyrl": "Анна Сара Мария Лейла Адам Даниэль Омар Давид",
}
RUSSIAN_GENITIVE = ("Анны", "Сары", "Марии", "Лейлы", "Адама", "Даниэля", "Омара", "Давида")
RUSSIAN_DATIVE = ("Анне", "Саре", "Марии", "Лейле", "Адаму", "Даниэлю", "Омару", "Давиду")

# Nouns, in the same order in every language. Russian: singular, genitive singular (2 to 4), genitive plural (5 and
# more). Arabic: plural (3 to 10), singular as used after 11 and more and after "how many". Chinese and Japanese:
# counter, noun.
NOUNS = {
    "eng_Latn": ["tickets", "bananas", "lemons", "envelopes", "gifts", "tomatoes", "pictures", "flags", "cakes"],
    "deu_Latn": [
        "Fahrkarten",
        "Bananen",
        "Zitronen",
        "Umschläge",
        "Geschenke",
        "Tomaten",
        "Bilder",
        "Fahnen",
        "Kuchen",
    ],
    "fra_Latn": ["billets", "bananes", "citrons", "enveloppes", "cadeaux", "tomates", "images", "drapeaux", "gâteaux"],
    "ind_Latn": ["tiket", "pisang", "lemon", "amplop", "hadiah", "tomat", "gambar", "bendera", "kue"],
    "swh_Latn": ["tiketi", "ndizi", "ndimu", "bahasha", "zawadi", "nyanya", "picha", "bendera", "keki"],
    "hin_Deva": ["टिकट", "केले", "नींबू", "लिफ़ाफ़े", "उपहार", "टमाटर", "चित्र", "झंडे", "केक"],
    "rus_Cyrl": [
        ("билет", "билета", "билетов"),
        ("банан", "банана", "бананов"),
        ("лимон", "лимона", "лимонов"),
        ("конверт", "конверта", "конвертов"),
        ("подарок", "подарка", "подарков"),
        ("помидор", "помидора", "помидоров"),
        ("рисунок", "рисунка", "рисунков"),
        ("флаг", "флага", "флагов"),
        ("пирог", "пирога", "пирогов"),
    ],
    "arb_Arab": [
        ("تذاكر", "تذكرة"),
        ("موزات", "موزة"),
        ("ليمونات", "ليمونة"),
        ("ظروف", "ظرفًا"),
        ("هدايا", "هدية"),
        ("حبات طماطم", "حبة طماطم"),
        ("صور", "صورة"),
        ("أعلام", "علمًا"),
        ("كعكات", "كعكة"),
    ],
    "zho_Hans": [
        ("张", "票"),
        ("根", "香蕉"),
        ("个", "柠檬"),
        ("个", "信封"),
        ("份", "礼物"),
        ("个", "西红柿"),
        ("张", "图片"),
        ("面", "旗子"),
        ("个", "蛋糕"),
    ],
    "jpn_Jpan": [
        ("枚", "切符"),
        ("本", "バナナ"),
        ("個", "レモン"),
        ("枚", "封筒"),
        ("個", "プレゼント"),
        ("個", "トマト"),
        ("枚", "絵"),
        ("本", "旗"),
        ("個", "ケーキ"),
    ],
}
RUSSIAN_TABLE = ("стол", "стола", "столов")

# Number words: 0 to 20, then 30 and 40 (Hindi: 0 to 40; Indonesian: 0 to 9; Swahili: 0 to 10). _number_word composes
# the others.
NUMBER_WORDS = {
    "eng_Latn": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty",
    "rus_Cyrl": "ноль один два три четыре пять шесть семь восемь девять десять одиннадцать двенадцать тринадцать "
    "четырнадцать пятнадцать шестнадцать семнадцать восемнадцать девятнадцать двадцать тридцать сорок",
    "deu_Latn": "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn "
    "sechzehn siebzehn achtzehn neunzehn zwanzig dreißig vierzig",
    "fra_Latn": "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize "
    "dix-sept dix-huit dix-neuf vingt trente quarante",
    "hin_Deva": "शून्य एक दो तीन चार पाँच छह सात आठ नौ दस ग्यारह बारह तेरह चौदह पंद्रह सोलह सत्रह अठारह उन्नीस बीस "
    "इक्कीस बाईस तेईस चौबीस पच्चीस छब्बीस सत्ताईस अट्ठाईस उनतीस तीस इकतीस बत्तीस तैंतीस चौंतीस पैंतीस छत्तीस सैंतीस "
    "अड़तीस उनतालीस चालीस",
    "ind_Latn": "nol satu dua tiga empat lima enam tujuh delapan sembilan",
    "swh_Latn": "sifuri moja mbili tatu nne tano sita saba nane tisa kumi",
    "arb_Arab": "صفر واحد اثنان ثلاثة أربعة خمسة ستة سبعة ثمانية تسعة عشرة",
}
SWAHILI_TENS = {10: "kumi", 20: "ishirini", 30: "thelathini", 40: "arobaini"}
KANJI = "〇一二三四五六七八九"
ARABIC_TENS = {20: "عشر", 30: "ثلاث", 40: "أربع"}

# {X} {Y} {Z}: the numbers of the equation (the first capitalized). {x} {y}: bare numbers. {xn}: number and noun.
# {xc}: number and counter. {n}: the noun as it follows "how many". {c}: the counter. [he|she]: by the gender of the
# first person.
EQUATIONS = {
    "eng_Latn": ("{X} plus {Y} is {Z}.", "{X} minus {Y} is {Z}.", "{X} times {Y} is {Z}."),
    "rus_Cyrl": ("{X} плюс {Y} будет {Z}.", "{X} минус {Y} будет {Z}.", "{X} умножить на {Y} будет {Z}."),
    "deu_Latn": ("{X} plus {Y} ist {Z}.", "{X} minus {Y} ist {Z}.", "{X} mal {Y} ist {Z}."),
    "fra_Latn": ("{X} plus {Y} font {Z}.", "{X} moins {Y} font {Z}.", "{X} fois {Y} font {Z}."),
    "jpn_Jpan": ("{X}たす{Y}は{Z}です。", "{X}ひく{Y}は{Z}です。", "{X}かける{Y}は{Z}です。"),
    "zho_Hans": ("{X}加{Y}等于{Z}。", "{X}减{Y}等于{Z}。", "{X}乘以{Y}等于{Z}。"),
    "arb_Arab": ("{X} زائد {Y} يساوي {Z}.", "{X} ناقص {Y} يساوي {Z}.", "{X} في {Y} يساوي {Z}."),
    "hin_Deva": ("{X} और {Y} मिलकर {Z} होते हैं।", "{X} में से {Y} घटाने पर {Z} बचते हैं।", "{X} गुणा {Y} बराबर {Z} होता है।"),
    "ind_Latn": (
        "{X} ditambah {Y} sama dengan {Z}.",
        "{X} dikurangi {Y} sama dengan {Z}.",
        "{X} dikali {Y} sama dengan {Z}.",
    ),
    "swh_Latn": ("{X} jumlisha {Y} ni sawa na {Z}.", "{X} toa {Y} ni sawa na {Z}.", "{X} mara {Y} ni sawa na {Z}."),
}
OPERATIONS = ("add", "subtract", "multiply")

TEXTS = {
    "eng_Latn": (
        ("{a} has {xn}. [He|She] buys {y} more. How many {n} does [he|she] have now?", "[He|She] has {zn} now."),
        (
            "{a} has {xn}. [He|She] gives {y} of them to {b}. How many {n} does [he|she] have left?",
            "[He|She] has {zn} left.",
        ),
        ("{a} has {xn} and {b} has {y}. How many {n} do they have together?", "Together they have {zn}."),
        (
            "There are {x} tables in the room. On each table there are {yn}. How many {n} are there in all?",
            "There are {zn} in all.",
        ),
        ("{a} has {xn} and {b} has {y}. How many more {n} does {a} have?", "{a} has {zn} more than {b}."),
    ),
    "rus_Cyrl": (
        (
            "У {a_gen} {xn}. [Он купил|Она купила] ещё {y}. Сколько {n} у [него|неё] теперь?",
            "Теперь у [него|неё] {zn}.",
        ),
        (
            "У {a_gen} {xn}. [Он отдал|Она отдала] {b_dat} {y}. Сколько {n} у [него|неё] осталось?",
            "У [него|неё] осталось {zn}.",
        ),
        ("У {a_gen} {xn}, а у {b_gen} {y}. Сколько {n} у них вместе?", "Вместе у них {zn}."),
        ("В комнате {x} {table}. На каждом столе {yn}. Сколько всего {n} на столах?", "Всего на столах {zn}."),
        ("У {a_gen} {xn}, а у {b_gen} {y}. На сколько {n} больше у {a_gen}?", "У {a_gen} на {zn} больше."),
    ),
    "deu_Latn": (
        ("{a} hat {xn}. [Er|Sie] kauft noch {y} dazu. Wie viele {n} hat [er|sie] jetzt?", "Jetzt hat [er|sie] {zn}."),
        ("{a} hat {xn}. [Er|Sie] gibt {b} {y} davon. Wie viele {n} hat [er|sie] noch?", "[Er|Sie] hat noch {zn}."),
        ("{a} hat {xn} und {b} hat {y}. Wie viele {n} haben sie zusammen?", "Zusammen haben sie {zn}."),
        (
            "Im Zimmer stehen {x} Tische. Auf jedem Tisch liegen {yn}. Wie viele {n} sind es insgesamt?",
            "Insgesamt sind es {zn}.",
        ),
        ("{a} hat {xn} und {b} hat {y}. Wie viele {n} hat {a} mehr als {b}?", "{a} hat {zn} mehr als {b}."),
    ),
    "fra_Latn": (
        (
            "{a} a {xn}. [Il|Elle] en achète encore {y}. Combien {n} a-t-[il|elle] maintenant ?",
            "[Il|Elle] a maintenant {zn}.",
        ),
        ("{a} a {xn}. [Il|Elle] en donne {y} à {b}. Combien {n} lui reste-t-il ?", "Il lui reste {zn}."),
        ("{a} a {xn} et {b} en a {y}. Combien {n} cela fait-il en tout ?", "En tout, cela fait {zn}."),
        (
            "Il y a {x} tables dans la pièce. Sur chaque table, il y a {yn}. Combien {n} y a-t-il en tout ?",
            "Il y a {zn} en tout.",
        ),
        ("{a} a {xn} et {b} en a {y}. Combien {n} {a} a-t-[il|elle] de plus que {b} ?", "{a} a {zn} de plus que {b}."),
    ),
    "jpn_Jpan": (
        (
            "{a}は{noun}を{xc}持っています。さらに{yc}買いました。いま{noun}は全部で何{c}ありますか。",
            "いま{noun}は全部で{zc}あります。",
        ),
        (
            "{a}は{noun}を{xc}持っています。そのうち{yc}を{b}にあげました。{noun}は何{c}残っていますか。",
            "{noun}は{zc}残っています。",
        ),
        (
            "{a}は{noun}を{xc}、{b}は{yc}持っています。{noun}は合わせて何{c}ありますか。",
            "{noun}は合わせて{zc}あります。",
        ),
        (
            "部屋に机が{x}つあります。どの机の上にも{noun}が{yc}あります。{noun}は全部で何{c}ありますか。",
            "{noun}は全部で{zc}あります。",
        ),
        ("{a}は{noun}を{xc}、{b}は{yc}持っています。{a}の{noun}のほうが何{c}多いですか。", "{a}のほうが{zc}多いです。"),
    ),
    "zho_Hans": (
        ("{a}有{xn}。[他|她]又买了{yc}。[他|她]现在有多少{c}{noun}？", "[他|她]现在有{zn}。"),
        ("{a}有{xn}。[他|她]给了{b}{yc}。[他|她]还剩多少{c}{noun}？", "[他|她]还剩{zn}。"),
        ("{a}有{xn}，{b}有{yc}。两人一共有多少{c}{noun}？", "两人一共有{zn}。"),
        ("房间里有{x}张桌子。每张桌子上有{yn}。一共有多少{c}{noun}？", "一共有{zn}。"),
        ("{a}有{xn}，{b}有{yc}。{a}比{b}多多少{c}{noun}？", "{a}比{b}多{zn}。"),
    ),
    "arb_Arab": (
        ("لدى {a} {xn}. ثم [اشترى|اشترت] {yn} أيضًا. كم {n} [لديه|لديها] الآن؟", "[لديه|لديها] الآن {zn}."),
        ("لدى {a} {xn}. [أعطى|أعطت] {b} {y} منها. كم {n} [لديه|لديها] الآن؟", "[لديه|لديها] الآن {zn}."),
        ("لدى {a} {xn}، ولدى {b} {yn}. كم {n} لديهما معًا؟", "لديهما معًا {zn}."),
        ("في الغرفة {x} طاولات، وعلى كل طاولة {yn}. كم {n} على الطاولات كلها؟", "على الطاولات كلها {zn}."),
        (
            "لدى {a} {xn}، ولدى {b} {yn}. بكم يزيد ما لدى {a} على ما لدى {b}؟",
            "يزيد ما لدى {a} على ما لدى {b} بمقدار {zn}.",
        ),
    ),
    "hin_Deva": (
        ("{a} के पास {xn} हैं। उसने {yn} और ख़रीदे। अब उसके पास कितने {n} हैं?", "अब उसके पास {zn} हैं।"),
        ("{a} के पास {xn} हैं। उसने {b} को {yn} दिए। अब उसके पास कितने {n} बचे हैं?", "अब उसके पास {zn} बचे हैं।"),
        ("{a} के पास {xn} हैं और {b} के पास {yn} हैं। दोनों के पास मिलाकर कितने {n} हैं?", "दोनों के पास मिलाकर {zn} हैं।"),
        ("कमरे में {x} मेज़ें हैं। हर मेज़ पर {yn} हैं। कुल मिलाकर कितने {n} हैं?", "कुल मिलाकर {zn} हैं।"),
        ("{a} के पास {xn} हैं और {b} के पास {yn} हैं। {a} के पास कितने {n} ज़्यादा हैं?", "{a} के पास {zn} ज़्यादा हैं।"),
    ),
    "ind_Latn": (
        ("{a} punya {xn}. Dia membeli {y} lagi. Berapa {n} yang dia punya sekarang?", "Sekarang dia punya {zn}."),
        ("{a} punya {xn}. Dia memberikan {y} kepada {b}. Berapa {n} yang masih dia punya?", "Dia masih punya {zn}."),
        ("{a} punya {xn} dan {b} punya {y}. Berapa jumlah {n} mereka berdua?", "Mereka berdua punya {zn}."),
        (
            "Ada {x} meja di ruangan itu. Di atas setiap meja ada {yn}. Berapa jumlah {n} seluruhnya?",
            "Seluruhnya ada {zn}.",
        ),
        (
            "{a} punya {xn} dan {b} punya {y}. Berapa {n} lebih banyak yang dimiliki {a}?",
            "{a} punya {zn} lebih banyak daripada {b}.",
        ),
    ),
    "swh_Latn": (
        ("{a} ana {xn}. Ananunua nyingine {y}. Sasa ana {n} ngapi?", "Sasa ana {zn}."),
        ("{a} ana {xn}. Anampa {b} {yn}. Amebaki na {n} ngapi?", "Amebaki na {zn}."),
        ("{a} ana {xn} na {b} ana {y}. Kwa jumla wana {n} ngapi?", "Kwa jumla wana {zn}."),
        ("Kuna meza {x} chumbani. Juu ya kila meza kuna {yn}. Kwa jumla kuna {n} ngapi?", "Kwa jumla kuna {zn}."),
        ("{a} ana {xn} na {b} ana {y}. {a} ana {n} ngapi zaidi ya {b}?", "{a} ana {zn} zaidi ya {b}."),
    ),
}


@dataclass(frozen=True)
class Problem:
    """A problem, not yet in any language: scenario, two numbers, and the indices of the noun and of the two people."""

    scenario: str
    x: int
    y: int
    noun: int
    first: int
    second: int

    @property
    def operation(self) -> str:
        return SCENARIOS[self.scenario]

    @property
    def result(self) -> int:
        return {"add": self.x + self.y, "subtract": self.x - self.y, "multiply": self.x * self.y}[self.operation]


def is_held_out(problem: Problem) -> bool:
    """True for the problems kept out of training: decided by the operation and the unordered pair of numbers alone."""
    low, high = sorted((problem.x, problem.y))
    digest = hashlib.sha256(f"{problem.operation} {low} {high}".encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0


def number_pairs(scenario: str) -> list[tuple[int, int]]:
    """The pairs a scenario may use. Every number, the result too, is in 3..40, never 21 or 31 (singular in Russian)."""
    operation = SCENARIOS[scenario]
    ranges = {
        "add": (range(3, 16), range(3, 16)),
        "subtract": (range(6, 21), range(3, 16)),
        "multiply": (range(3, 10), range(3, 10)),
    }
    pairs = []
    for x in ranges[operation][0]:
        for y in ranges[operation][1]:
            result = Problem(scenario, x, y, 0, 0, 1).result
            if 3 <= result <= 40 and result not in (21, 31):
                pairs.append((x, y))
    return pairs


def sample_problems(count: int, seed: int, held_out: bool) -> Iterator[Problem]:
    """``count`` distinct problems, the scenarios in turn, from the held-out side or from the training side."""
    rng = random.Random(seed)
    pairs = {
        name: [p for p in number_pairs(name) if is_held_out(Problem(name, *p, 0, 0, 1)) == held_out]
        for name in SCENARIOS
    }
    seen: set[Problem] = set()
    names = list(SCENARIOS)
    while len(seen) < count:
        scenario = names[len(seen) % len(names)]
        x, y = rng.choice(pairs[scenario])
        first, second = rng.sample(range(len(NAMES)), 2)
        problem = Problem(scenario, x, y, rng.randrange(len(NOUNS["eng_Latn"])), first, second)
        if problem not in seen:
            seen.add(problem)
            yield problem


def _number_word(language: str, number: int, oblique: bool = False) -> str:
    tens, units = number - number % 10, number % 10
    if language in ("jpn_Jpan", "zho_Hans"):
        return ("" if tens == 0 else "十" if tens == 10 else KANJI[tens // 10] + "十") + (KANJI[units] if units else "")
    words = NUMBER_WORDS[language].split()
    if language == "arb_Arab":
        return _arabic_number_word(words, number, oblique)
    if language == "ind_Latn":
        return _indonesian_number_word(words, number)
    if language == "swh_Latn":
        return words[number] if number <= 10 else SWAHILI_TENS[tens] + (f" na {words[units]}" if units else "")
    if language == "hin_Deva" or number <= 20:
        return words[number]
    ten = words[tens // 10 + 18]
    if units == 0:
        return ten
    if language == "deu_Latn":
        return f"{words[units]}und{ten}"
    return f"{ten} {words[units]}" if language == "rus_Cyrl" else f"{ten}-{words[units]}"


def _indonesian_number_word(words: list[str], number: int) -> str:
    if number in (10, 11):
        return {10: "sepuluh", 11: "sebelas"}[number]
    tens, units = divmod(number, 10)
    if number < 20:
        return words[number] if number < 10 else words[units] + " belas"
    return words[tens] + " puluh" + (" " + words[units] if units else "")


def _arabic_number_word(words: list[str], number: int, oblique: bool) -> str:
    """The number as it stands in an equation: nominative at its head, oblique after the operator and the verb."""
    tens, units = number - number % 10, number % 10
    two = "اثنين" if oblique else "اثنان"
    if number <= 10:
        return two if number == 2 else words[number]
    if number < 20:
        special = {1: "أحد", 2: "اثني" if oblique else "اثنا"}
        return f"{special.get(units, words[units])} عشر"
    ten = ARABIC_TENS[tens] + ("ين" if oblique else "ون")
    return ten if units == 0 else f"{two if units == 2 else words[units]} و{ten}"


def _russian_form(forms: tuple[str, str, str], number: int) -> str:
    if 11 <= number % 100 <= 14 or number % 10 in (0, 5, 6, 7, 8, 9):
        return forms[2]
    return forms[0] if number % 10 == 1 else forms[1]


def _noun_slots(language: str, problem: Problem, numbers: dict[str, str]) -> dict[str, str]:
    """The slots that join a number with the noun, each in the form that the number asks for."""
    noun = NOUNS[language][problem.noun]
    values = {"x": problem.x, "y": problem.y, "z": problem.result}
    if language in ("jpn_Jpan", "zho_Hans"):
        counter, word = noun
        slots = {f"{k}c": numbers[k] + counter for k in values} | {f"{k}n": numbers[k] + counter + word for k in values}
        return slots | {"c": counter, "noun": word}
    if language == "rus_Cyrl":
        slots = {f"{k}n": f"{numbers[k]} {_russian_form(noun, v)}" for k, v in values.items()}
        return slots | {"n": noun[2], "table": _russian_form(RUSSIAN_TABLE, problem.x)}
    if language == "arb_Arab":
        return {f"{k}n": f"{numbers[k]} {noun[0] if v <= 10 else noun[1]}" for k, v in values.items()} | {"n": noun[1]}
    if language == "swh_Latn":
        return {f"{k}n": f"{noun} {numbers[k]}" for k in values} | {"n": noun}
    how_many = noun
    if language == "fra_Latn":
        how_many = f"d'{noun}" if noun[0] in "aeiou" else f"de {noun}"
    return {f"{k}n": f"{numbers[k]} {noun}" for k in values} | {"n": how_many}


def render(problem: Problem, language: str, digits: bool = False) -> str:
    """The problem and its solution as one text: "Anna has five gifts. She buys ... Five plus three is eight. ..."."""
    values = {"x": problem.x, "y": problem.y, "z": problem.result}
    written = digits or language == "arb_Arab"
    numbers = {k: str(v) if written else _number_word(language, v) for k, v in values.items()}
    equation = {k.upper(): str(v) if digits else _number_word(language, v, k != "x") for k, v in values.items()}
    equation["X"] = equation["X"][0].upper() + equation["X"][1:]
    names = LOCAL_NAMES[language].split() if language in LOCAL_NAMES else list(NAMES)
    slots = {"a": names[problem.first], "b": names[problem.second], **numbers, **equation}
    if language == "rus_Cyrl":
        slots |= {"a_gen": RUSSIAN_GENITIVE[problem.first], "b_gen": RUSSIAN_GENITIVE[problem.second]}
        slots |= {"b_dat": RUSSIAN_DATIVE[problem.second]}
    slots |= _noun_slots(language, problem, numbers)
    question, answer = TEXTS[language][list(SCENARIOS).index(problem.scenario)]
    space = "" if language in ("jpn_Jpan", "zho_Hans") else " "
    text = space.join((question, EQUATIONS[language][OPERATIONS.index(problem.operation)], answer))
    female = NAMES[problem.first] in FEMALE
    text = re.sub(r"\[([^|\]]*)\|([^\]]*)\]", lambda match: match.group(2 if female else 1), text)
    return text.format(**slots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the TSV file to write")
    parser.add_argument("--count", type=int, default=50, help="how many problems (default 50)")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    rows: dict[tuple[str, ...], None] = {}  # distinct texts: some problems differ only in what a text does not name
    for problem in sample_problems(10 * args.count, args.seed, held_out=True):
        rows[tuple(render(problem, language) for language in LANGUAGES)] = None
        if len(rows) == args.count:
            break
    lines = ["\t".join(("item", *LANGUAGES))]
    lines += ["\t".join((f"arithmetic-{index:03d}", *row)) for index, row in enumerate(rows, start=1)]
    partial = args.out.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, args.out)
    print(f"{len(rows)} problems in {len(LANGUAGES)} languages written to {args.out}")


if __name__ == "__main__":
    main()
