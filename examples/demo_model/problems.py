"""Digit problems in ten languages: sums, differences and comparisons, for training and judging the demonstration model.

    python examples/demo_model/problems.py --out moe_route/data/corpus/problems.tsv

Which pairs of numbers a language sees in training is decided by the pair alone, in one fixed shuffle: English sees the
first 90 %, every other language the first 60 to 5 %, and nobody the last 10 %. Neither the order of the numbers nor the
operation matters: a pair is held out with all of its problems. So three subsets have the same problems everywhere:

- ``seen``: pairs that every language saw;
- ``english_only``: pairs that English saw and no other language;
- ``unseen``: pairs that no language saw.

Which language gets which share is an `ORDERS`: neither is correlated with the amount of text of the languages, nor with
their script, nor with the other one (Spearman correlations of 0), so that skill and script can be told apart.

The templates were written for this project. Except for English and German, no native speaker has checked them; numbers
do not change the endings of nouns around them, as several of the languages would ask.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = (
    "eng_Latn", "rus_Cyrl", "deu_Latn", "fra_Latn", "jpn_Jpan",
    "zho_Hans", "arb_Arab", "hin_Deva", "ind_Latn", "swh_Latn",
)  # fmt: skip
UNSPACED = ("jpn_Jpan", "zho_Hans")
OPERATIONS = ("add", "sub", "cmp")
LARGEST = 30  # operand
ENGLISH_SHARE = 0.90
SHARES = (0.60, 0.50, 0.40, 0.35, 0.30, 0.25, 0.20, 0.15, 0.05)
# The other nine languages, from the largest share to the smallest.
ORDERS = (
    ("rus_Cyrl", "swh_Latn", "jpn_Jpan", "hin_Deva", "ind_Latn", "fra_Latn", "deu_Latn", "zho_Hans", "arb_Arab"),
    ("ind_Latn", "arb_Arab", "rus_Cyrl", "jpn_Jpan", "deu_Latn", "swh_Latn", "zho_Hans", "fra_Latn", "hin_Deva"),
)
SUBSETS = ("seen", "english_only", "unseen")

# {a}, {b}: the numbers. The answer follows the text, after a space where the language has spaces.
TEMPLATES: dict[str, dict[str, tuple[str, ...]]] = {
    "eng_Latn": {
        "add": (
            "{a} plus {b} is",
            "Anna has {a} books and buys {b} more. Now she has",
            "There are {a} men and {b} women in the room. Together they are",
            "We walked {a} kilometers yesterday and {b} today. In all that is",
            "If you add {b} to {a}, you get",
        ),
        "sub": (
            "{a} minus {b} is",
            "Tom had {a} apples and ate {b} of them. Now he has",
            "Of {a} children {b} went home. Those who stayed are",
            "The book has {a} pages and I have read {b}. The pages left are",
            "If you take {b} from {a}, you get",
        ),
        "cmp": (
            "The larger of {a} and {b} is",
            "One box weighs {a} kilos, another {b}. The heavier one weighs",
            "Tom is {a} years old and Mary is {b}. The older one is",
        ),
    },
    "deu_Latn": {
        "add": (
            "{a} plus {b} ist",
            "Anna hat {a} Bücher und kauft noch {b}. Jetzt hat sie",
            "Im Zimmer sind {a} Männer und {b} Frauen. Zusammen sind es",
            "Wir sind gestern {a} Kilometer gegangen und heute {b}. Insgesamt sind das",
            "Wenn man {b} zu {a} addiert, erhält man",
        ),
        "sub": (
            "{a} minus {b} ist",
            "Tom hatte {a} Äpfel und aß davon {b}. Jetzt hat er",
            "Von {a} Kindern gingen {b} nach Hause. Es blieben",
            "Das Buch hat {a} Seiten und ich habe {b} gelesen. Übrig sind",
            "Wenn man {b} von {a} abzieht, erhält man",
        ),
        "cmp": (
            "Die größere Zahl von {a} und {b} ist",
            "Eine Kiste wiegt {a} Kilo, eine andere {b}. Die schwerere wiegt",
            "Tom ist {a} Jahre alt und Maria {b}. Die ältere Person ist",
        ),
    },
    "rus_Cyrl": {
        "add": (
            "{a} плюс {b} равно",
            "У Анны {a} книг, и она покупает ещё {b}. Теперь у неё",
            "В комнате {a} мужчин и {b} женщин. Вместе их",
            "Вчера мы прошли {a} километров, а сегодня {b}. Всего это",
            "Если прибавить {b} к {a}, получится",
        ),
        "sub": (
            "{a} минус {b} равно",
            "У Тома было {a} яблок, он съел {b}. Теперь у него",
            "Из {a} детей {b} ушли домой. Осталось",
            "В книге {a} страниц, я прочитал {b}. Осталось страниц",
            "Если вычесть {b} из {a}, получится",
        ),
        "cmp": (
            "Большее из чисел {a} и {b} это",
            "Один ящик весит {a} кило, другой {b}. Более тяжёлый весит",
            "Тому {a} лет, а Марии {b}. Старшему",
        ),
    },
    "fra_Latn": {
        "add": (
            "{a} plus {b} font",
            "Anna a {a} livres et en achète encore {b}. Maintenant elle en a",
            "Il y a {a} hommes et {b} femmes dans la pièce. Ensemble ils sont",
            "Nous avons marché {a} kilomètres hier et {b} aujourd'hui. En tout cela fait",
            "Si on ajoute {b} à {a}, on obtient",
        ),
        "sub": (
            "{a} moins {b} font",
            "Tom avait {a} pommes et en a mangé {b}. Maintenant il en a",
            "Sur {a} enfants, {b} sont rentrés. Il en reste",
            "Le livre a {a} pages et j'en ai lu {b}. Les pages qui restent sont",
            "Si on enlève {b} de {a}, on obtient",
        ),
        "cmp": (
            "Le plus grand de {a} et {b} est",
            "Une boîte pèse {a} kilos, une autre {b}. La plus lourde pèse",
            "Tom a {a} ans et Marie en a {b}. Le plus âgé a",
        ),
    },
    "jpn_Jpan": {
        "add": (
            "{a}足す{b}は",
            "アンナは本を{a}冊持っていて、さらに{b}冊買います。今は",
            "部屋に男が{a}人、女が{b}人います。合わせて",
            "昨日は{a}キロ、今日は{b}キロ歩きました。全部で",
            "{a}に{b}を加えると",
        ),
        "sub": (
            "{a}引く{b}は",
            "トムはりんごを{a}個持っていて、{b}個食べました。今は",
            "子供{a}人のうち{b}人が帰りました。残りは",
            "本は{a}ページあって、{b}ページ読みました。残りのページは",
            "{a}から{b}を取ると",
        ),
        "cmp": (
            "{a}と{b}の大きい方は",
            "一つの箱は{a}キロ、もう一つは{b}キロです。重い方は",
            "トムは{a}歳、メアリーは{b}歳です。年上は",
        ),
    },
    "zho_Hans": {
        "add": (
            "{a}加{b}等于",
            "安娜有{a}本书，又买了{b}本。现在她有",
            "房间里有{a}个男人和{b}个女人。一共有",
            "我们昨天走了{a}公里，今天走了{b}公里。总共是",
            "把{b}加到{a}上，得到",
        ),
        "sub": (
            "{a}减{b}等于",
            "汤姆有{a}个苹果，吃了{b}个。现在他有",
            "{a}个孩子中有{b}个回家了。剩下",
            "这本书有{a}页，我读了{b}页。剩下的页数是",
            "从{a}中拿走{b}，得到",
        ),
        "cmp": (
            "{a}和{b}中较大的是",
            "一个箱子重{a}公斤，另一个重{b}公斤。较重的是",
            "汤姆{a}岁，玛丽{b}岁。年纪大的是",
        ),
    },
    "arb_Arab": {
        "add": (
            "{a} زائد {b} يساوي",
            "عند آنا {a} كتابا وتشتري {b} أخرى. الآن عندها",
            "في الغرفة {a} رجلا و {b} امرأة. معا هم",
            "مشينا أمس {a} كيلومترا واليوم {b}. المجموع هو",
            "إذا أضفنا {b} إلى {a} نحصل على",
        ),
        "sub": (
            "{a} ناقص {b} يساوي",
            "كان عند توم {a} تفاحة وأكل منها {b}. الآن عنده",
            "من {a} طفلا ذهب {b} إلى البيت. بقي",
            "في الكتاب {a} صفحة وقرأت {b}. الصفحات الباقية هي",
            "إذا طرحنا {b} من {a} نحصل على",
        ),
        "cmp": (
            "الأكبر من {a} و {b} هو",
            "صندوق يزن {a} كيلو وآخر {b}. الأثقل يزن",
            "عمر توم {a} سنة وعمر ماري {b}. عمر الأكبر",
        ),
    },
    "hin_Deva": {
        "add": (
            "{a} जमा {b} बराबर",
            "अन्ना के पास {a} किताबें हैं और वह {b} और खरीदती है। अब उसके पास हैं",
            "कमरे में {a} आदमी और {b} औरतें हैं। कुल मिलाकर",
            "हम कल {a} किलोमीटर चले और आज {b}। कुल हुए",
            "{a} में {b} जोड़ने पर मिलता है",
        ),
        "sub": (
            "{a} घटा {b} बराबर",
            "टॉम के पास {a} सेब थे, उसने {b} खा लिए। अब उसके पास हैं",
            "{a} बच्चों में से {b} घर चले गए। बचे",
            "किताब में {a} पन्ने हैं और मैंने {b} पढ़ लिए। बाकी पन्ने हैं",
            "{a} में से {b} निकालने पर मिलता है",
        ),
        "cmp": (
            "{a} और {b} में बड़ा है",
            "एक डिब्बा {a} किलो का है, दूसरा {b} का। भारी वाला है",
            "टॉम {a} साल का है और मैरी {b} की। बड़े की उम्र है",
        ),
    },
    "ind_Latn": {
        "add": (
            "{a} tambah {b} adalah",
            "Anna punya {a} buku dan membeli {b} lagi. Sekarang dia punya",
            "Di kamar ada {a} pria dan {b} wanita. Semuanya ada",
            "Kemarin kami berjalan {a} kilometer dan hari ini {b}. Jumlahnya",
            "Jika {b} ditambahkan ke {a}, hasilnya",
        ),
        "sub": (
            "{a} kurang {b} adalah",
            "Tom punya {a} apel dan makan {b}. Sekarang dia punya",
            "Dari {a} anak, {b} pulang. Yang tinggal ada",
            "Buku itu punya {a} halaman dan saya sudah membaca {b}. Halaman yang tersisa",
            "Jika {b} diambil dari {a}, hasilnya",
        ),
        "cmp": (
            "Yang lebih besar dari {a} dan {b} adalah",
            "Satu kotak beratnya {a} kilo, yang lain {b}. Yang lebih berat",
            "Tom berumur {a} tahun dan Mary {b}. Yang lebih tua berumur",
        ),
    },
    "swh_Latn": {
        "add": (
            "{a} jumlisha {b} ni",
            "Anna ana vitabu {a} na ananunua {b} zaidi. Sasa ana",
            "Chumbani kuna wanaume {a} na wanawake {b}. Kwa pamoja ni",
            "Jana tulitembea kilomita {a} na leo {b}. Jumla ni",
            "Ukiongeza {b} kwa {a}, unapata",
        ),
        "sub": (
            "{a} toa {b} ni",
            "Tom alikuwa na matofaa {a} akala {b}. Sasa ana",
            "Kati ya watoto {a}, {b} walienda nyumbani. Waliobaki ni",
            "Kitabu kina kurasa {a} nami nimesoma {b}. Kurasa zilizobaki ni",
            "Ukiondoa {b} kutoka {a}, unapata",
        ),
        "cmp": (
            "Kubwa kati ya {a} na {b} ni",
            "Sanduku moja lina kilo {a}, lingine {b}. Zito zaidi lina",
            "Tom ana miaka {a} na Mary ana {b}. Mkubwa ana",
        ),
    },
}  # fmt: skip


def shares(order: int) -> dict[str, float]:
    """Share of the pairs of numbers that each language sees in training, under one of the `ORDERS`."""
    return {"eng_Latn": ENGLISH_SHARE} | dict(zip(ORDERS[order], SHARES, strict=True))


def pairs(subset: str | None = None, share: float = 1.0) -> list[tuple[int, int]]:
    """Pairs (larger, smaller) in their fixed shuffle: a subset of `SUBSETS`, or the first `share` of all."""
    everything = [(a, b) for a in range(2, LARGEST + 1) for b in range(1, a) if a + b < 100]
    random.Random(12345).shuffle(everything)
    at = [round(x * len(everything)) for x in (min(SHARES), max(SHARES), ENGLISH_SHARE)]
    found = {"seen": everything[: at[0]], "english_only": everything[at[1] : at[2]], "unseen": everything[at[2] :]}
    return found[subset] if subset is not None else everything[: round(share * len(everything))]


@dataclass(frozen=True)
class Problem:
    """One problem, before it is put into words. `swap` turns the numbers round, except in a difference."""

    operation: str
    template: int
    larger: int
    smaller: int
    swap: bool = False

    @property
    def answer(self) -> int:
        both = {"add": self.larger + self.smaller, "sub": self.larger - self.smaller}
        return both.get(self.operation, self.larger)

    def text(self, language: str) -> str:
        """The problem in words, without its answer."""
        a, b = self.larger, self.smaller
        if self.swap and self.operation != "sub":
            a, b = b, a
        return TEMPLATES[language][self.operation][self.template].format(a=a, b=b)


def separator(language: str) -> str:
    """What stands between a problem and its answer."""
    return "" if language in UNSPACED else " "


def task_set(count: int, seed: int) -> Iterator[tuple[str, str, Problem]]:
    """`count` distinct problems of each subset, half sums and half differences: item, subset, problem."""
    for subset in SUBSETS:
        rng = random.Random(f"{seed} {subset}")
        made: dict[Problem, None] = {}
        available = pairs(subset)
        while len(made) < count:
            operation = OPERATIONS[len(made) % 2]
            larger, smaller = available[len(made) // 2 % len(available)]
            template = rng.randrange(len(TEMPLATES["eng_Latn"][operation]))
            swap = rng.random() < 0.5 and operation != "sub"  # a swapped difference would be the same problem
            made[Problem(operation, template, larger, smaller, swap)] = None
        for number, problem in enumerate(made, start=1):
            yield f"{subset}-{number:03d}", subset, problem


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the TSV file to write")
    parser.add_argument("--count", type=int, default=120, help="problems of each subset (default 120)")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    lines = ["\t".join(("item", "subset", "operation", "answer", *LANGUAGES))]
    for item, subset, problem in task_set(args.count, args.seed):
        texts = (problem.text(language) + separator(language) for language in LANGUAGES)
        lines.append("\t".join((item, subset, problem.operation, str(problem.answer), *texts)))
    partial = args.out.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, args.out)
    print(f"{len(lines) - 1} problems in {len(LANGUAGES)} languages written to {args.out}")


if __name__ == "__main__":
    main()
