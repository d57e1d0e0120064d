"""Copying a number and counting on, in ten languages: what else a model does with digits, beside sums (problems.py).

    python examples/demo_model/controls.py --out moe_route/data/corpus/controls.tsv

The numbers are those of the problems' operands and answers. A number and a sentence are held out together, by a hash,
in all languages alike: training has the number in the other sentences, and the sentence with the other numbers.

The templates were written for this project. Except for English and German, no native speaker has checked them.
"""

from __future__ import annotations

import argparse
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from problems import LANGUAGES, separator

from moe_route.base.files import write_text

KINDS = ("copy", "count")
ANSWERS = range(2, 61)  # of the held-out ones, as the sums have them; training goes on to 99
HELD_OUT_PERCENT = 20

# {a}: the number, {b} and {c}: the next two. The answer follows the text, after a space where the language has spaces.
TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "eng_Latn": {
        "copy": (
            "The number is {a}. Once more: the number is",
            "Anna lives at number {a}. You find her at number",
            "Tom is {a} years old. When they ask his age, he says",
            "The bus to town has the number {a}. We wait for bus",
        ),
        "count": (
            "Count on: {a}, {b}, {c},",
            "The pages have the numbers {a}, {b}, {c},",
            "The children call out the numbers: {a}, {b}, {c},",
        ),
    },
    "deu_Latn": {
        "copy": (
            "Die Zahl ist {a}. Noch einmal: Die Zahl ist",
            "Anna wohnt in Nummer {a}. Man findet sie in Nummer",
            "Tom ist {a} Jahre alt. Wenn man nach seinem Alter fragt, sagt er",
            "Der Bus in die Stadt hat die Nummer {a}. Wir warten auf den Bus",
        ),
        "count": (
            "Zähle weiter: {a}, {b}, {c},",
            "Die Seiten haben die Nummern {a}, {b}, {c},",
            "Die Kinder rufen die Zahlen: {a}, {b}, {c},",
        ),
    },
    "rus_Cyrl": {
        "copy": (
            "Это число {a}. Ещё раз: это число",
            "Анна живёт в доме {a}. Её можно найти в доме",
            "Тому {a} лет. Когда спрашивают, сколько ему лет, он говорит",
            "Автобус в город имеет номер {a}. Мы ждём автобус",
        ),
        "count": (
            "Считай дальше: {a}, {b}, {c},",
            "Страницы имеют номера {a}, {b}, {c},",
            "Дети называют числа: {a}, {b}, {c},",
        ),
    },
    "fra_Latn": {
        "copy": (
            "Le nombre est {a}. Encore une fois : le nombre est",
            "Anna habite au numéro {a}. On la trouve au numéro",
            "Tom a {a} ans. Quand on lui demande son âge, il dit",
            "Le bus pour la ville porte le numéro {a}. Nous attendons le bus",
        ),
        "count": (
            "Continue à compter : {a}, {b}, {c},",
            "Les pages portent les numéros {a}, {b}, {c},",
            "Les enfants crient les nombres : {a}, {b}, {c},",
        ),
    },
    "jpn_Jpan": {
        "copy": (
            "数は{a}です。もう一度言うと、数は",
            "アンナは{a}番の家に住んでいます。彼女の家の番号は",
            "トムは{a}歳です。年を聞かれると、彼の答えは",
            "町へ行くバスは{a}番です。私たちが待つバスの番号は",
        ),
        "count": (
            "続けて数えると、{a}、{b}、{c}、",
            "ページの番号は{a}、{b}、{c}、",
            "子供たちが数を言います。{a}、{b}、{c}、",
        ),
    },
    "zho_Hans": {
        "copy": (
            "数字是{a}。再说一遍，数字是",
            "安娜住在{a}号。她家的门牌号是",
            "汤姆今年{a}岁。有人问他的年龄，他说",
            "进城的公共汽车是{a}路。我们等的车是",
        ),
        "count": (
            "接着数：{a}、{b}、{c}、",
            "页码是{a}、{b}、{c}、",
            "孩子们报数：{a}、{b}、{c}、",
        ),
    },
    "arb_Arab": {
        "copy": (
            "الرقم هو {a}. مرة أخرى: الرقم هو",
            "تسكن آنا في البيت رقم {a}. تجدها في البيت رقم",
            "عمر توم {a} سنة. عندما يسألونه عن عمره يقول",
            "رقم الحافلة إلى المدينة {a}. ننتظر الحافلة رقم",
        ),
        "count": (
            "تابع العد: {a}، {b}، {c}،",
            "أرقام الصفحات هي {a}، {b}، {c}،",
            "ينادي الأطفال بالأرقام: {a}، {b}، {c}،",
        ),
    },
    "hin_Deva": {
        "copy": (
            "संख्या {a} है। एक बार फिर, संख्या है",
            "अन्ना मकान नंबर {a} में रहती है। उसका मकान नंबर है",
            "टॉम {a} साल का है। उम्र पूछने पर वह कहता है",
            "शहर की बस का नंबर {a} है। हमारी बस का नंबर है",
        ),
        "count": (
            "आगे गिनो: {a}, {b}, {c},",
            "पन्नों के नंबर हैं {a}, {b}, {c},",
            "बच्चे संख्याएँ बोलते हैं: {a}, {b}, {c},",
        ),
    },
    "ind_Latn": {
        "copy": (
            "Angkanya adalah {a}. Sekali lagi: angkanya adalah",
            "Anna tinggal di nomor {a}. Dia bisa ditemukan di nomor",
            "Tom berumur {a} tahun. Kalau ditanya umurnya, dia menjawab",
            "Bus ke kota bernomor {a}. Kami menunggu bus nomor",
        ),
        "count": (
            "Teruskan menghitung: {a}, {b}, {c},",
            "Halaman-halaman itu bernomor {a}, {b}, {c},",
            "Anak-anak menyebut angka: {a}, {b}, {c},",
        ),
    },
    "swh_Latn": {
        "copy": (
            "Namba ni {a}. Tena, namba ni",
            "Anna anaishi katika nyumba namba {a}. Yuko katika nyumba namba",
            "Tom ana miaka {a}. Akiulizwa umri wake, anasema",
            "Basi la mjini ni namba {a}. Tunasubiri basi namba",
        ),
        "count": (
            "Endelea kuhesabu: {a}, {b}, {c},",
            "Kurasa zina namba {a}, {b}, {c},",
            "Watoto wanataja namba: {a}, {b}, {c},",
        ),
    },
}


@dataclass(frozen=True)
class Control:
    """A number to copy, or three numbers to count on from: `number` is the first one."""

    kind: str
    template: int
    number: int

    @property
    def answer(self) -> int:
        return self.number + (3 if self.kind == "count" else 0)

    @property
    def held_out(self) -> bool:
        """Whether no language sees this number in this sentence."""
        key = f"{self.kind} {self.template} {self.number}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 100 < HELD_OUT_PERCENT

    def text(self, language: str) -> str:
        """The sentence, without the answer."""
        a = self.number
        return TEMPLATES[language][self.kind][self.template].format(a=a, b=a + 1, c=a + 2)


def controls(kind: str) -> Iterator[Control]:
    """All controls of a kind whose answer is below 100."""
    for template in range(len(TEMPLATES["eng_Latn"][kind])):
        yield from (one for number in range(1, 100) if (one := Control(kind, template, number)).answer < 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the TSV file to write")
    parser.add_argument("--count", type=int, default=24, help="held-out ones of each kind (default 24)")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    lines = ["\t".join(("item", "subset", "answer", *LANGUAGES))]
    for kind in KINDS:
        held = [one for one in controls(kind) if one.held_out and one.answer in ANSWERS]
        for number, one in enumerate(random.Random(f"{args.seed} {kind}").sample(held, args.count), start=1):
            texts = (one.text(language) + separator(language) for language in LANGUAGES)
            lines.append("\t".join((f"{kind}-{number:03d}", kind, str(one.answer), *texts)))
    write_text(args.out, "\n".join(lines) + "\n")
    print(f"{len(lines) - 1} controls in {len(LANGUAGES)} languages written to {args.out}")


if __name__ == "__main__":
    main()
