"""English names and scripts of languages, by the codes that corpora use.

The table is that of FLORES-200 [github.com/facebookresearch/flores, flores200/README.md], with three shorter names:
"Arabic" for Modern Standard Arabic, "Chinese" and "Chinese (traditional)" for the two scripts of Chinese. The same
language is found by its code in FLORES ("swh_Latn"), NTREX ("swa", "zho-CN"), Tatoeba ("ara") and MGSM ("sw").
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

_FLORES = """
ace_Arab Acehnese (Arabic script)|ace_Latn Acehnese (Latin script)|acm_Arab Mesopotamian Arabic|
acq_Arab Ta’izzi-Adeni Arabic|aeb_Arab Tunisian Arabic|afr_Latn Afrikaans|ajp_Arab South Levantine Arabic|
aka_Latn Akan|amh_Ethi Amharic|apc_Arab North Levantine Arabic|arb_Arab Arabic|arb_Latn Arabic (romanized)|
ars_Arab Najdi Arabic|ary_Arab Moroccan Arabic|arz_Arab Egyptian Arabic|asm_Beng Assamese|ast_Latn Asturian|
awa_Deva Awadhi|ayr_Latn Central Aymara|azb_Arab South Azerbaijani|azj_Latn North Azerbaijani|bak_Cyrl Bashkir|
bam_Latn Bambara|ban_Latn Balinese|bel_Cyrl Belarusian|bem_Latn Bemba|ben_Beng Bengali|bho_Deva Bhojpuri|
bjn_Arab Banjar (Arabic script)|bjn_Latn Banjar (Latin script)|bod_Tibt Standard Tibetan|bos_Latn Bosnian|
bug_Latn Buginese|bul_Cyrl Bulgarian|cat_Latn Catalan|ceb_Latn Cebuano|ces_Latn Czech|cjk_Latn Chokwe|
ckb_Arab Central Kurdish|crh_Latn Crimean Tatar|cym_Latn Welsh|dan_Latn Danish|deu_Latn German|
dik_Latn Southwestern Dinka|dyu_Latn Dyula|dzo_Tibt Dzongkha|ell_Grek Greek|eng_Latn English|epo_Latn Esperanto|
est_Latn Estonian|eus_Latn Basque|ewe_Latn Ewe|fao_Latn Faroese|fij_Latn Fijian|fin_Latn Finnish|fon_Latn Fon|
fra_Latn French|fur_Latn Friulian|fuv_Latn Nigerian Fulfulde|gla_Latn Scottish Gaelic|gle_Latn Irish|
glg_Latn Galician|grn_Latn Guarani|guj_Gujr Gujarati|hat_Latn Haitian Creole|hau_Latn Hausa|heb_Hebr Hebrew|
hin_Deva Hindi|hne_Deva Chhattisgarhi|hrv_Latn Croatian|hun_Latn Hungarian|hye_Armn Armenian|ibo_Latn Igbo|
ilo_Latn Ilocano|ind_Latn Indonesian|isl_Latn Icelandic|ita_Latn Italian|jav_Latn Javanese|jpn_Jpan Japanese|
kab_Latn Kabyle|kac_Latn Jingpho|kam_Latn Kamba|kan_Knda Kannada|kas_Arab Kashmiri (Arabic script)|
kas_Deva Kashmiri (Devanagari script)|kat_Geor Georgian|knc_Arab Central Kanuri (Arabic script)|
knc_Latn Central Kanuri (Latin script)|kaz_Cyrl Kazakh|kbp_Latn Kabiyè|kea_Latn Kabuverdianu|khm_Khmr Khmer|
kik_Latn Kikuyu|kin_Latn Kinyarwanda|kir_Cyrl Kyrgyz|kmb_Latn Kimbundu|kmr_Latn Northern Kurdish|kon_Latn Kikongo|
kor_Hang Korean|lao_Laoo Lao|lij_Latn Ligurian|lim_Latn Limburgish|lin_Latn Lingala|lit_Latn Lithuanian|
lmo_Latn Lombard|ltg_Latn Latgalian|ltz_Latn Luxembourgish|lua_Latn Luba-Kasai|lug_Latn Ganda|luo_Latn Luo|
lus_Latn Mizo|lvs_Latn Standard Latvian|mag_Deva Magahi|mai_Deva Maithili|mal_Mlym Malayalam|mar_Deva Marathi|
min_Arab Minangkabau (Arabic script)|min_Latn Minangkabau (Latin script)|mkd_Cyrl Macedonian|
plt_Latn Plateau Malagasy|mlt_Latn Maltese|mni_Beng Meitei (Bengali script)|khk_Cyrl Halh Mongolian|mos_Latn Mossi|
mri_Latn Maori|mya_Mymr Burmese|nld_Latn Dutch|nno_Latn Norwegian Nynorsk|nob_Latn Norwegian Bokmål|npi_Deva Nepali|
nso_Latn Northern Sotho|nus_Latn Nuer|nya_Latn Nyanja|oci_Latn Occitan|gaz_Latn West Central Oromo|ory_Orya Odia|
pag_Latn Pangasinan|pan_Guru Eastern Panjabi|pap_Latn Papiamento|pes_Arab Western Persian|pol_Latn Polish|
por_Latn Portuguese|prs_Arab Dari|pbt_Arab Southern Pashto|quy_Latn Ayacucho Quechua|ron_Latn Romanian|
run_Latn Rundi|rus_Cyrl Russian|sag_Latn Sango|san_Deva Sanskrit|sat_Olck Santali|scn_Latn Sicilian|shn_Mymr Shan|
sin_Sinh Sinhala|slk_Latn Slovak|slv_Latn Slovenian|smo_Latn Samoan|sna_Latn Shona|snd_Arab Sindhi|som_Latn Somali|
sot_Latn Southern Sotho|spa_Latn Spanish|als_Latn Tosk Albanian|srd_Latn Sardinian|srp_Cyrl Serbian|ssw_Latn Swati|
sun_Latn Sundanese|swe_Latn Swedish|swh_Latn Swahili|szl_Latn Silesian|tam_Taml Tamil|tat_Cyrl Tatar|
tel_Telu Telugu|tgk_Cyrl Tajik|tgl_Latn Tagalog|tha_Thai Thai|tir_Ethi Tigrinya|taq_Latn Tamasheq (Latin script)|
taq_Tfng Tamasheq (Tifinagh script)|tpi_Latn Tok Pisin|tsn_Latn Tswana|tso_Latn Tsonga|tuk_Latn Turkmen|
tum_Latn Tumbuka|tur_Latn Turkish|twi_Latn Twi|tzm_Tfng Central Atlas Tamazight|uig_Arab Uyghur|ukr_Cyrl Ukrainian|
umb_Latn Umbundu|urd_Arab Urdu|uzn_Latn Northern Uzbek|vec_Latn Venetian|vie_Latn Vietnamese|war_Latn Waray|
wol_Latn Wolof|xho_Latn Xhosa|ydd_Hebr Eastern Yiddish|yor_Latn Yoruba|yue_Hant Yue Chinese|zho_Hans Chinese|
zho_Hant Chinese (traditional)|zsm_Latn Standard Malay|zul_Latn Zulu
"""
# Other codes of a language of the table: ISO 639-1, and the macrolanguages and variants of ISO 639-3 that corpora name.
_ALIASES = """
afr af|amh am|arb ar ara|asm as|azj az aze|bak ba|bel be|bem|ben bn|bod bo|bos bs|bul bg|cat ca|ces cs|cym cy|dan da|
deu de|dzo dz|ell el|eng en|epo eo|est et ekk|eus eu|ewe ee|fao fo|fij fj|fin fi|fra fr|gla gd|gle ga|glg gl|grn gn gug|
guj gu|hat ht|hau ha|heb he|hin hi|hrv hr|hun hu|hye hy|ibo ig|ind id|isl is|ita it|jav jv|jpn ja|kan kn|kat ka|
kaz kk|khm km|kik ki|kin rw|kir ky|kmr ku kur|kor ko|lao lo|lim li|lin ln|lit lt|ltz lb|lug lg|lvs lv lav|mal ml|
mar mr|mkd mk|plt mg mlg|mlt mt|khk mn mon|mri mi|mya my|nld nl|nno nn|nob nb no nor|npi ne nep|nya ny|oci oc|
gaz om orm|ory or ori|pan pa|pes fa fas|pol pl|por pt|pbt ps pus|quy qu que|ron ro|run rn|rus ru|sag sg|san sa|sin si|
slk sk|slv sl|smo sm|sna sn|snd sd|som so|sot st|spa es|als sq sqi|srd sc|srp sr|ssw ss|sun su|swe sv|swh sw swa|
tam ta|tat tt|tel te|tgk tg|tgl tl fil|tha th|tir ti|tsn tn|tso ts|tuk tk|tur tr|twi tw|uig ug|ukr uk|urd ur|uzn uz uzb|
vie vi|wol wo|xho xh|ydd yi yid|yor yo|zho zh cmn|zsm ms msa|zul zu|ayr ay aym
"""
_SCRIPTS = {
    "Arab": "Arabic",
    "Armn": "Armenian",
    "Beng": "Bengali",
    "Cyrl": "Cyrillic",
    "Deva": "Devanagari",
    "Ethi": "Ethiopic",
    "Geor": "Georgian",
    "Grek": "Greek",
    "Gujr": "Gujarati",
    "Guru": "Gurmukhi",
    "Hang": "Hangul",
    "Hans": "Chinese",
    "Hant": "Chinese",
    "Hani": "Chinese",
    "Hebr": "Hebrew",
    "Jpan": "Japanese",
    "Khmr": "Khmer",
    "Knda": "Kannada",
    "Laoo": "Lao",
    "Latn": "Latin",
    "Mlym": "Malayalam",
    "Mymr": "Burmese",
    "Olck": "Ol Chiki",
    "Orya": "Odia",
    "Sinh": "Sinhala",
    "Taml": "Tamil",
    "Telu": "Telugu",
    "Tfng": "Tifinagh",
    "Thai": "Thai",
    "Tibt": "Tibetan",
}


class Language(NamedTuple):
    """A language that a code names."""

    code: str  # the language's code in ISO 639-3 as in FLORES, such as "swh"
    name: str  # in English
    script: str  # code in ISO 15924, such as "Latn"; "" if the code does not say and the language has several

    @property
    def script_name(self) -> str:
        """The script in English, such as "Latin"; its code if the table does not have it."""
        return _SCRIPTS.get(self.script, self.script)


def language(code: str) -> Language | None:
    """Find the language of a code ("swh_Latn", "swh", "swa", "sw", "zho-CN"), None if the code names none.

    Upper and lower case are the same, and so are "_" and "-". A script that the table does not list for the language
    is taken from the code; other parts, such as a country, are added to the name: "English (GB)".
    """
    first, *rest = code.replace("-", "_").split("_")
    table, by_code = _table()
    known = by_code.get(first.lower())
    if known is None:
        return None
    script = next((part.capitalize() for part in rest if part.capitalize() in _SCRIPTS), "")
    if any(part.capitalize() != script and not _is_country(part) for part in rest):
        return None
    script = {"Hani": "Hans"}.get(script, script) or ("Hant" if known == "zho" and {"TW", "HK"} & set(rest) else "")
    names = table[known]
    countries = [part for part in rest if _is_country(part) and known != "zho"]
    if not script:
        script = next(iter(names)) if len(names) == 1 or known in ("arb", "zho") else ""
    name = names.get(script) or next(iter(names.values())).partition(" (")[0]
    return Language(known, f"{name} ({countries[0]})" if countries else name, script)


def codes() -> tuple[str, ...]:
    """The codes of the table, as FLORES writes them: "eng_Latn"."""
    return tuple(f"{code}_{script}" for code, names in _table()[0].items() for script in names)


def flores_code(code: str) -> str | None:
    """The code of FLORES of the language that a code names: "swh_Latn" for "sw"; None if it names none.

    Where the code says no script of the table, it is Latin, or else the language's first one.
    """
    known = language(code)
    if known is None:
        return None
    scripts = _table()[0][known.code]
    script = next(one for one in (known.script, "Latn", *scripts) if one in scripts)
    return f"{known.code}_{script}"


def language_name(code: str) -> str:
    """The English name of the language of a code, or the code itself if it names no language of the table."""
    known = language(code)
    return code if known is None else known.name


def is_language(name: str) -> bool:
    """Whether this is a code of a language of the table, or its English name, in any case of letters."""
    return language(name.strip()) is not None or name.strip().lower() in _english_names()


def spaces_words(code: str) -> bool:
    """Whether words are put apart by spaces in the language of a code of FLORES; not so Japanese and Chinese."""
    return code not in ("jpn_Jpan", "zho_Hans", "zho_Hant")


@cache
def _english_names() -> frozenset[str]:
    return frozenset(name.lower() for names in _table()[0].values() for name in names.values())


def _is_country(part: str) -> bool:
    return len(part) == 2 and part.isupper()


@cache
def _table() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Language code of FLORES -> script -> name, and any code of a language -> its code of FLORES."""
    table: dict[str, dict[str, str]] = {}
    for row in _FLORES.replace("\n", "").split("|"):
        code, name = row.split(" ", 1)
        language, script = code.split("_")
        table.setdefault(language, {})[script] = name
    by_code = {code: code for code in table}
    for row in _ALIASES.replace("\n", "").split("|"):
        first, *others = row.split()
        by_code |= dict.fromkeys(others, first)
    return table, by_code


# Language families that share an expert when a dense model becomes a sparse one.
#
# The assignment is the one published for 50 languages [ApolloMoE, arXiv 2410.10626]: six small groups and one of
# "Indo-European and all others", which takes every further language of the table of `moe_route.data.languages`. The
# varieties of Arabic go with Arabic. Dogri, published beside the Austronesian languages, is in no corpus of ours.

_OTHERS = "Indo-European and others"
_MEMBERS = {
    "Chinese": "zho_Hans zho_Hant",
    "Korean, Japanese, Nepali": "kor_Hang jpn_Jpan npi_Deva",
    "Thai, Vietnamese, Lao": "tha_Thai vie_Latn lao_Laoo",
    "Austronesian": "plt_Latn ceb_Latn sun_Latn ilo_Latn",
    _OTHERS: "",
    "Semitic and Kurdish": "arb_Arab arb_Latn acm_Arab acq_Arab aeb_Arab ajp_Arab apc_Arab ars_Arab ary_Arab "
    "arz_Arab ckb_Arab mlt_Latn heb_Hebr",
    "African": "swh_Latn ibo_Latn hau_Latn kin_Latn bam_Latn lin_Latn nso_Latn",
}


def _table_families() -> dict[str, str]:
    named = {code: family for family, members in _MEMBERS.items() for code in members.split()}
    # The families in the published order, so that the number of a family is that of its expert.
    order = list(_MEMBERS)
    languages = sorted(codes(), key=lambda code: order.index(named.get(code, _OTHERS)))
    return {code: named.get(code, _OTHERS) for code in languages}


LANGUAGE_FAMILIES: dict[str, str] = _table_families()


def families_of(languages: list[str] | tuple[str, ...]) -> dict[str, str]:
    """The family of each language, by any code that `moe_route.data.languages` knows ("sw", "swh", "swh_Latn").

    Only families that occur are in the result, so a model for three languages gets at most three experts. Raises
    ``ValueError`` for a code that is in no table.
    """
    families: dict[str, str] = {}
    for each in languages:
        code = flores_code(each)
        if code is None or code not in LANGUAGE_FAMILIES:
            raise ValueError(f"no language has the code {each!r}: give the families as a mapping from group to family")
        families[each] = LANGUAGE_FAMILIES[code]
    return families
