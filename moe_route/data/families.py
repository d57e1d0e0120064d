"""Language families that share an expert when a dense model becomes a sparse one.

The assignment is the one published for 50 languages [ApolloMoE, arXiv 2410.10626]: six small groups and one of
"Indo-European and all others", which takes every further language of the table of `moe_route.languages`. The varieties
of Arabic go with Arabic. Dogri, published beside the Austronesian languages, is in no corpus of ours.
"""

from __future__ import annotations

from moe_route.languages import codes, flores_code

__all__ = ["LANGUAGE_FAMILIES", "families_of"]

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


def _table() -> dict[str, str]:
    named = {code: family for family, members in _MEMBERS.items() for code in members.split()}
    # The families in the published order, so that the number of a family is that of its expert.
    order = list(_MEMBERS)
    languages = sorted(codes(), key=lambda code: order.index(named.get(code, _OTHERS)))
    return {code: named.get(code, _OTHERS) for code in languages}


LANGUAGE_FAMILIES: dict[str, str] = _table()


def families_of(languages: list[str] | tuple[str, ...]) -> dict[str, str]:
    """The family of each language, by any code that `moe_route.languages` knows ("sw", "swh", "swh_Latn").

    Only families that occur are in the result, so a model for three languages gets at most three experts. Raises
    ``ValueError`` for a code that is in no table.
    """
    found: dict[str, str] = {}
    for each in languages:
        code = flores_code(each)
        if code is None or code not in LANGUAGE_FAMILIES:
            raise ValueError(f"no language has the code {each!r}: give the families as a mapping from group to family")
        found[each] = LANGUAGE_FAMILIES[code]
    return found
