"""rank_pattern and alpha_pattern: the modules that PEFT's own rule matches, and no expression that takes for ever."""

import json
import re
import time

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from fedgram.bindings._peft.patterns import PatternTable
from fedgram.bindings.peft import load_adapter, save_adapter
from fedgram_testing.peft_adapters import llama, load_with_peft, peft_deltas, write_client


def matches(pattern: str, name: str) -> bool:
    return bool(PatternTable({pattern: True}).matching(name))


NAMES = [
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.mlp.experts.3.up_proj",
    "base.model.layers.0.self_attn.k_proj",
    "modelxlayersx0xself_attnxq_proj",
    "model.layers.0.self_attn.q_proj\n",
    "model\n.layers.0.self_attn.q_proj",
    ".q_proj",
    "x.ünïcode.名前",
    "",
]
PATTERNS = [
    "q_proj",
    "layers.0.self_attn.q_proj",
    r".*\.layers\.(0|1)\.self_attn\.q_proj",
    r"^model\.layers\.\d+\..*",
    r"^model\.layers\.0\.self_attn\.q_proj",
    r"layers\.\d{1,2}\.self_attn\.[qk]_proj",
    r"(?:.*?(?:language|model).*?(?:attn|mlp).*?(?:q_proj|up_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.mlp)",
    r"(?!.*k_proj).*_proj",
    r".*(?<=self_attn\.)q_proj",
    r"\w+",
    r"[^.]+",
    r"\bq_proj\b",
    r"(q)_(p)roj|up_proj",
    r"q_proj)|(up_proj",
    r"q_proj$|k_proj\Z",
    r"\Aq_proj",
    "",
    ".",
    "q.proj",
    "(a*)*q_proj",
    r"名前|\W",
]


def by_peft(pattern, name):
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_what_peft_matches(pattern):
    for name in NAMES:
        assert matches(pattern, name) == by_peft(pattern, name), name


def test_of_several_patterns_the_first_comes_first_and_values_are_given_once():
    patterns = {pattern: i % 4 for i, pattern in enumerate(PATTERNS)}
    table = PatternTable(patterns)
    assert dict(table) == patterns
    for name in NAMES:
        found = table.matching(name)
        assert found == list(dict.fromkeys(v for k, v in patterns.items() if by_peft(k, name)))
        if found:
            assert found[0] == patterns[get_pattern_key(list(patterns), name)]


ATOMS = ["a", "b", ".", r"\.", r"\d", r"\w", r"\W", "[ab]", "[^a]", "[a-c.]", "^", "$", r"\b", r"\B", "1", "\n"]


def expressions():
    """Regular expressions over a small alphabet, nested."""
    return st.recursive(
        st.sampled_from(ATOMS),
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=3).map("".join),
            st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
            st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,2}", "{2,}", "{0,2}?"])).map(
                lambda pair: f"({pair[0]}){pair[1]}"
            ),
            inner.map(lambda x: f"(?={x})"),
            inner.map(lambda x: f"(?!{x})"),
        ),
        max_leaves=7,
    )


@settings(max_examples=600, deadline=None, derandomize=True)
@given(expressions(), st.text(alphabet="ab.1\n", max_size=7))
@example("(a|)*b", "aab")
@example("(?:a$\n)*", "a\n")
def test_any_expression_matches_as_python_matches_it(pattern, name):
    assert matches(pattern, name) == by_peft(pattern, name)


HOSTILE = [
    "(a+)+b",
    "(a|a)*b",
    "(a|aa|.)+" * 50 + "b",
    "(.*a){40}b",
    "((((a*)*)*)*)*b",
    "(a{0,60}){0,60}b",
    "(a?){300}a{300}b",
    ".*" * 400 + "b",
    "(){1000000000}b",
    "(?=(a*)*b)" * 8 + "b",
    "(.*(.*(.*(.*x)*)*)*)*b",
]


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: pattern[:20])
def test_no_expression_takes_for_ever(pattern):
    """Python's own matcher would take years for the first of these; here each is told or refused within its budget."""
    begin = time.process_time()
    try:
        table = PatternTable({pattern: 1}, "file: ")
        told = str({value for i in range(30) for value in table.matching("x." + "a" * 300 + str(i))})
    except ValueError as error:
        told = str(error)
    assert re.fullmatch(r"set\(\)|file: .*(too many steps|is too large).*", told)
    assert time.process_time() - begin < 30  # a budget of ten million steps; seconds on any machine


def test_steps_are_bounded_whatever_the_number_of_modules():
    table = PatternTable({".*" * i + "b": i for i in range(1, 60)}, "config: ")
    with pytest.raises(ValueError, match=r"config: m.*matching the patterns takes too many steps"):
        all(table.matching(f"m{i}" + "a" * 1000) == [] for i in range(10**6))


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "is not a regular expression"),
        ("a{5,2}", "is not a regular expression"),
        ("(?i)a", "is not a regular expression"),
        (r"(a)\1", "uses groupref, which is not supported"),
        ("(?>a)", "uses atomic_group, which is not supported"),
        ("a*+", "uses possessive_repeat, which is not supported"),
        ("(?i:a)", "uses inline flags, which are not supported"),
        ("(?=a)" * 30, "is too large: more than 10 look-arounds"),
        (
            "[" + "".join(f"{chr(200 + 9 * i)}-{chr(203 + 9 * i)}" for i in range(21)) + "]",
            "is too large: more than 20 ranges in a class",
        ),
        ("a" * 1001, "is longer than 1000 characters"),
        ("(.{999}){999}", "is too large: more than 20000 states"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_not_known_is_refused_by_name(pattern, reason):
    with pytest.raises(ValueError, match=r"^path: ") as caught:
        PatternTable({"fine": 1, pattern: 2}, "path: ")
    assert f"{pattern[:1000]!r} {reason}" in str(caught.value)


def test_thousands_of_names_are_looked_up_at_once():
    """As an output for many experts has them: a search pattern by pattern would take minutes."""
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(40) for j in range(64)]
    table = PatternTable({name if i % 2 else f"^{re.escape(name)}": i for i, name in enumerate(names)})
    begin = time.process_time()
    assert all(table.matching(name) == [i] for i, name in enumerate(names))
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("depth", [20, 499])
def test_nesting_is_matched_or_refused(depth):
    try:
        assert PatternTable({"(" * depth + "a" + ")" * depth: 1}, "path: ").matching("x.a") == [1]
    except ValueError as error:
        assert depth > 20, error  # noqa: PT017 - where the interpreter's own depth ends is its own affair


def test_no_expression_of_a_client_goes_into_the_output(tmp_path):
    """PEFT would run it over every name of the base model, wherever the output is loaded."""
    hostile = "(.*a)*(.*b)*(.*)*_proj"
    options = {"target_modules": r".*layers\.0.*(q|v)_proj", "r": 2, "task_type": "CAUSAL_LM"}
    model = write_client(tmp_path / "in", llama(), **options)
    deltas = peft_deltas(model)
    for field in ("target_modules", "exclude_modules", "layers_pattern"):
        config = json.loads((tmp_path / "in" / "adapter_config.json").read_text()) | {field: hostile}
        (tmp_path / "in" / "adapter_config.json").write_text(json.dumps(config))
        adapter = load_adapter(tmp_path / "in")
        save_adapter(adapter, tmp_path / "out")
        assert hostile not in (tmp_path / "out" / "adapter_config.json").read_text()
    loaded = peft_deltas(load_with_peft(llama(), tmp_path / "out"))
    assert loaded.keys() == deltas.keys()
    for name, delta in loaded.items():
        torch.testing.assert_close(delta, deltas[name])


def test_modules_to_save_are_names(tmp_path):
    write_client(tmp_path, llama(), target_modules=["q_proj"], r=2)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for entries, reason in ((["(a+)+b"], "is not a name but a regular expression"), (["a"] * 2000, "more than 1000")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": entries}))
        with pytest.raises(ValueError, match=reason):
            load_adapter(tmp_path)
