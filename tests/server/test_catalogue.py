import re
from decimal import Decimal
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octoai.server.catalogue import (
    EMBEDDED_MODEL_ID,
    BadCatalogue,
    Catalogue,
    FileSource,
    HfSource,
    Model,
    PypiSource,
    parse_model,
    price_nanos,
    price_usd_per_million,
)

HERE = Path("/etc/octoai")


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.load()


def test_the_embedded_model_has_a_source_a_checksum_and_a_price(catalogue: Catalogue) -> None:
    model = catalogue[EMBEDDED_MODEL_ID]
    assert isinstance(model.source, PypiSource)
    assert model.sha256
    assert model.size_bytes == 98362432
    assert (model.context_length, model.licence, model.input_price_nanos) == (8192, "Apache-2.0", 20)
    assert catalogue.find("smollm2") is model


@pytest.mark.parametrize(
    ("model_id", "context_length", "input_nanos", "output_nanos"),
    [
        ("meta-llama-3-8b-instruct", 8192, 150, 150),
        ("meta-llama-3.1-405b-instruct", 131072, 3000, 9000),
        ("mixtral-8x22b-instruct", 65536, 1200, 1200),
        ("thenlper/gte-large", 512, 50, 0),
        ("phi-3.5-vision-instruct", 131072, None, None),
        ("qwen2-7b-instruct", None, 150, 150),
    ],
)
def test_the_historical_ids_are_known(
    catalogue: Catalogue, model_id: str, context_length: int, input_nanos: int, output_nanos: int
) -> None:
    model = catalogue[model_id]
    assert model.context_length == context_length
    assert (model.input_price_nanos, model.output_price_nanos) == (input_nanos, output_nanos)
    assert model.cached_input_price_nanos == input_nanos
    assert model.source is None


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("Meta-Llama-3-8B-Instruct", "meta-llama-3-8b-instruct"),
        ("llama-3-70b-instruct", "meta-llama-3-70b-instruct"),
        ("llama-2-70b-chat-int4", "llama-2-70b-chat"),
        ("CodeLlama-34B-instruct-FP16", "codellama-34b-instruct"),
        ("llama-3-8b-instruct-fp16", "meta-llama-3-8b-instruct"),  # listed nowhere: the suffix is passed over
        ("llamaguard-2-8b", "llamaguard-2-7b"),
        ("gte-large", "thenlper/gte-large"),
    ],
)
def test_aliases_are_found_in_any_case(catalogue: Catalogue, name: str, model_id: str) -> None:
    found = catalogue.find(name)
    assert found is not None
    assert found.id == model_id


@pytest.mark.parametrize("name", ["", "gpt-4", "-fp16", "meta-llama-3-8b-instruct-int8"])
def test_an_unknown_name_is_not_found(catalogue: Catalogue, name: str) -> None:
    assert catalogue.find(name) is None


def test_the_nearest_ids_are_named(catalogue: Catalogue) -> None:
    assert catalogue.nearest("meta-llama3-8b-instruct")[0] == "meta-llama-3-8b-instruct"
    assert len(catalogue.nearest("llama", n=2)) <= 2
    assert len(set(catalogue.nearest("llama-2-70b-chat-fp8", n=5))) == len(
        catalogue.nearest("llama-2-70b-chat-fp8", n=5)
    )
    assert catalogue.nearest("€" * 1_000_000) == ()


def plainly_nearest(name: str, catalogue: Catalogue, n: int) -> tuple[str, ...]:
    """Every name compared whole, with all of that one."""

    def likeness(model: Model) -> float:
        words = re.findall(r"[a-z]{2,}|[0-9.]+[a-z]*", name.lower())
        return max(
            SequenceMatcher(None, name.lower(), known).ratio()
            + sum(word in known for word in words) / max(1, len(words))
            for known in map(str.lower, model.names)
        )

    alike = [model.id for model in catalogue.values() if likeness(model) > 0]
    return tuple(sorted(alike, key=lambda model_id: -likeness(catalogue[model_id]))[:n])


EDITS = st.lists(st.tuples(st.integers(0, 40), st.sampled_from(["", "-", "x", "8b", "A", "l", "7"])), max_size=5)


@given(st.data(), EDITS, st.integers(1, 4))
def test_the_nearest_are_those_that_comparing_all_would_find(data: st.DataObject, edits: Any, n: int) -> None:
    shipped = Catalogue.load()
    name = data.draw(st.sampled_from([name for model in shipped.values() for name in model.names] + ["gpt-4", "€", ""]))
    for place, new in edits:
        name = name[:place] + new + name[place + 1 :]
    assert shipped.nearest(name, n) == plainly_nearest(name[:64], shipped, n)


def test_few_names_are_compared_with_one_that_nothing_has(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 133 models a request for a model that there is not took 10 to 30 ms, in which nobody else was served."""
    compared: list[str] = []

    class Counting(SequenceMatcher[str]):
        def __init__(self, junk: Any, wanted: str, known: str) -> None:
            compared.append(wanted)
            super().__init__(junk, wanted, known)

    monkeypatch.setattr("octoai.server.catalogue.difflib.SequenceMatcher", Counting)
    many = [Model(f"acme/model-{number}", aliases=(f"fam{number}-large",)) for number in range(200)]
    extended = catalogue.with_models(many)
    assert extended.nearest("meta-llama-3.1-8b-instrukt")[0] == "meta-llama-3.1-8b-instruct"
    assert len(compared) < 20
    compared.clear()
    assert extended.nearest("acme/model-family-" * 1000)
    assert len(compared) <= 50 and set(map(len, compared)) == {64}


def test_a_users_model_takes_the_names_it_uses(catalogue: Catalogue) -> None:
    mine = Model("llama-3-8b-instruct", aliases=("meta-llama-3-70b-instruct",))
    extended = catalogue.with_models([mine])
    assert extended.find("LLAMA-3-8b-instruct") is mine
    assert extended.find("meta-llama-3-70b-instruct") is mine
    assert "meta-llama-3-70b-instruct" not in extended
    assert extended["meta-llama-3-8b-instruct"].aliases == ()
    assert catalogue.find("llama-3-8b-instruct") is not mine
    assert len(extended) == len(catalogue)


def test_two_models_cannot_share_a_name(catalogue: Catalogue) -> None:
    with pytest.raises(BadCatalogue, match="'B' is given twice"):
        catalogue.with_models([Model("a", aliases=("b",)), Model("B")])
    with pytest.raises(BadCatalogue, match="'A' is given twice"):
        Catalogue([Model("a", aliases=("A",))])


# Prices


@given(st.integers(min_value=0, max_value=999_999_999))
def test_a_price_survives_there_and_back(nanos: int) -> None:
    text = price_usd_per_million(nanos)
    assert price_nanos(text) == nanos
    assert Decimal(text) * 1000 == nanos


@given(st.decimals(min_value=0, max_value=999_999, places=5))
def test_a_price_is_exact_or_refused(price: Decimal) -> None:
    text = f"{price:f}"
    nanos = price * 1000
    if nanos == int(nanos):
        assert price_nanos(text) == nanos
    else:
        with pytest.raises(ValueError, match="finer"):
            price_nanos(text)


@given(st.text(alphabet="0123456789.-+eE_ NaNinfinity\u0663\n", max_size=12))
def test_whatever_a_price_says_it_is_a_whole_number_or_a_refusal(text: str) -> None:
    try:
        nanos = price_nanos(text)
    except ValueError:
        return
    assert nanos == Decimal(text) * 1000


@pytest.mark.parametrize("text", ["", "-1", "1e3", "NaN", "0.15\n", " 1", "1.", ".5", "1_000", "٣", "1" * 7])
def test_a_price_in_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="dollars per million"):
        price_nanos(text)


# Entries and files


@pytest.mark.parametrize(
    ("source", "parsed"),
    [
        ({"kind": "file", "path": "w/m.gguf"}, FileSource("file", HERE / "w/m.gguf")),
        ({"kind": "file", "path": "/w/m.gguf"}, FileSource("file", Path("/w/m.gguf"))),
        ({"kind": "hf", "repo": "a/b", "filename": "m.gguf"}, HfSource("hf", "a/b", "m.gguf", "main")),
    ],
)
def test_sources_are_typed(source: dict[str, Any], parsed: object) -> None:
    assert parse_model({"id": "m", "source": source}, base=HERE).source == parsed


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("text", "model None: entry"),
        ({}, "model None: id: field required"),
        ({"id": "-x"}, "model '-x': id"),
        ({"id": "m", "contxt": 1}, "model 'm': unknown key 'contxt'"),
        ({"id": "m", "context_length": "8192"}, "model 'm': context_length"),
        ({"id": "m", "context_length": 0}, "model 'm': context_length"),
        ({"id": "m", "kind": "poem"}, "model 'm': kind"),
        ({"id": "m", "input_price": 0.15}, "model 'm': input_price"),
        ({"id": "m", "input_price": "0.0001"}, "model 'm': the price '0.0001' is finer"),
        ({"id": "m", "sha256": "ABC"}, "model 'm': sha256"),
        ({"id": "m", "source": {"kind": "ftp"}}, "model 'm': source"),
        ({"id": "m", "source": {"kind": "file"}}, "model 'm': source.file.path"),
        ({"id": "m", "source": {"kind": "file", "path": "x", "mode": 1}}, "unknown key 'source.file.mode'"),
        ({"id": "m", "source": {"kind": "pypi", "parts": []}}, "model 'm': source.pypi.parts"),
        (
            {
                "id": "m",
                "source": {
                    "kind": "pypi",
                    "parts": [{"wheel": "a==1\n-r x", "wheel_sha256": "0" * 64, "member": "m"}],
                },
            },
            "source.pypi.parts.0.wheel",
        ),
    ],
)
def test_a_bad_entry_is_one_line_that_names_the_place(entry: object, complaint: str) -> None:
    with pytest.raises(BadCatalogue) as caught:
        parse_model(entry, base=HERE)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[models", "not valid TOML"),
        ("\udcff", "not valid TOML"),
        ("x = 1", "[[models]] tables and nothing else"),
        ("models = 3", "[[models]] tables and nothing else"),
        ('[[models]]\nid = "m"\nlicense = "MIT"', "unknown key 'license'"),
        ('[[models]]\nid = "m"\n[[models]]\nid = "M"', "'M' is given twice"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(BadCatalogue) as caught:
        Catalogue.load(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadCatalogue, match=r"cannot read the catalogue .*: No such file"):
        Catalogue.load(tmp_path / "none.toml")
