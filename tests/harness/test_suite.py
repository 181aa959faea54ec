"""Suite files: what is read, and how each mistake is reported: file, line, field, allowed values."""

import json

import pytest
import yaml

from harness.suite import FOLDER, SCHEMA_FILE, available, json_schema, load, load_all
from harness.verdict import Verdict
from harness.yaml_file import LIMIT_BYTES, SuiteError

GOOD = """\
schema: 1
name: mine
description: A suite.
defaults:
  cpu: {dtype: float32}
groups:
  - name: first
    mode: helix-gqa
    backend: HELIX_CPU
    hardware: cpu
    model: recipe:llama-k4
    layout: {tp: 4, dcp: 2}
    interleave: [1, 16]
    serve: {seed: 0, block-size: [16, 32]}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def problems_of(path):
    with pytest.raises(SuiteError) as caught:
        load(path)
    return caught.value.problems


def test_one_value_is_an_axis_of_one(write):
    suite = load(write(GOOD))
    group = suite.groups[0]
    assert group.backend == ("HELIX_CPU",)
    assert [(layout.tp, layout.dcp) for layout in group.layout] == [(4, 2)]
    assert group.interleave == (1, 16)
    assert group.serve == {"seed": (0,), "block-size": (16, 32)}
    assert (group.comm, group.workload, group.expect) == ((None,), "standard", None)


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "says"),
    [
        ("schema: 1", "schema: 2", 1, "schema", "is 2; allowed: 1"),
        ("name: mine", "name: other", 2, "name", "allowed: 'mine'"),
        ("mode: helix-gqa", "mode: helix", 8, "groups[0].mode", "'standard-tp', 'standard-dcp'"),
        ("mode: helix-gqa", "moed: helix-gqa", 8, "groups[0].moed", "did you mean 'mode'?"),
        ("backend: HELIX_CPU", "backend: FLASH_ATN", 9, "groups[0].backend", "FLASH_ATTN"),
        ("backend: HELIX_CPU", "backend: [HELIX_CPU, flash]", 9, "groups[0].backend[1]", "'flash'"),
        ("hardware: cpu", "hardware: volta", 10, "groups[0].hardware", "'hopper'"),
        ("recipe:llama-k4", "recipe:llama-k9", 11, "groups[0].model", "recipe:llama-k4"),
        ("{tp: 4, dcp: 2}", "{tp: '4', dcp: 2}", 12, "groups[0].layout.tp", "valid integer"),
        ("{tp: 4, dcp: 2}", "{tp: 0}", 12, "groups[0].layout.tp", "greater than or equal to 1"),
        ("{tp: 4, dcp: 2}", "{tp: 4, pcp: 2}", 12, "groups[0].layout.pcp", "allowed: tp, dcp"),
        ("[1, 16]", "[]", 13, "groups[0].interleave", "at least 1 item"),
        ("[1, 16]", "[1, true]", 13, "groups[0].interleave[1]", "True"),
        ("seed: 0", "port: 80", 14, "groups[0].serve", "the harness sets it"),
        ("seed: 0", "api-key: abc", 14, "groups[0].serve", "the harness sets it"),
        ("seed: 0", "config: /etc/passwd", 14, "groups[0].serve", "the harness sets it"),
        ("seed: 0", "uds: /tmp/x", 14, "groups[0].serve", "the harness sets it"),
        ("seed: 0", "ssl-keyfile: /tmp/x", 14, "groups[0].serve", "the harness sets it"),
        ("seed: 0", "served_model_name: x", 14, "groups[0].serve", "is written 'served-model-name'"),
        ("seed: 0", "trust_remote_code: true", 14, "groups[0].serve", "is written 'trust-remote-code'"),
        ("seed: 0", "trust-remote: true", 14, "groups[0].serve", "would read it as 'trust-remote-code'"),
        ("seed: 0", "served-model: x", 14, "groups[0].serve", "would read it as 'served-model-name'"),
        ("dtype: float32", "api_key: abc", 5, "defaults.cpu", "is written 'api-key'"),
        ("recipe:llama-k4", "../main", 11, "groups[0].model", "should match pattern"),
        ("recipe:llama-k4", "org/.hidden", 11, "groups[0].model", "should match pattern"),
        ("seed: 0", "tensor-parallel-size: 2", 14, "groups[0].serve", "use 'layout'"),
        ("seed: 0", "seed: 2024-01-01", 14, "groups[0].serve.seed", "allowed: text, a number"),
        ("interleave: [1, 16]", "expect: fail\n    why: x", 13, "groups[0].expect", "may declare pass, xfail"),
        (
            "interleave: [1, 16]",
            "helix: {allow_gqa_tpa: true}",
            13,
            "groups[0].helix.allow_gqa_tpa",
            "allowed: allow_gqa_tpa1",
        ),
        ("interleave: [1, 16]", "expect: xfail", 7, "groups[0]", "needs a 'why'"),
        ("interleave: [1, 16]", "workload: tiny", 13, "groups[0].workload", "'smoke' or 'standard'"),
        ("    mode: helix-gqa\n", "", 7, "groups[0]", "'mode' is required"),
        ("    mode: helix-gqa\n", "    mode: helix-gqa\n    mode: helix-mla\n", 9, "", "already given on line 8"),
        ("{dtype: float32}", "&a {dtype: float32}", 5, "", "anchors and aliases are not allowed"),
        ("{dtype: float32}", "{dtype: float32", 6, "", "not valid YAML"),
        ("{dtype: float32}", "!!python/object:os.system {}", 5, "", "not valid YAML"),
    ],
)
def test_mistakes_are_reported_with_line_and_field(write, old, new, line, field, says):
    assert old in GOOD
    path = write(GOOD.replace(old, new))
    found = problems_of(path)
    match = [problem for problem in found if (problem.line, problem.field) == (line, field)]
    assert match, [str(problem) for problem in found]
    assert says in match[0].message
    assert str(match[0]).startswith(f"{path}:{line}: ")


def test_an_option_of_a_dotted_kind_keeps_its_inner_name(write):
    """vLLM reads `a_b.c_d` as `a-b.c_d`: only the name of the option itself is respelled."""
    suite = load(write(GOOD.replace("seed: 0", "compilation-config.cudagraph_mode: NONE")))
    assert suite.groups[0].serve["compilation-config.cudagraph_mode"] == ("NONE",)


def test_all_mistakes_of_a_file_are_reported_at_once(write):
    found = problems_of(write(GOOD.replace("mode: helix-gqa", "mode: x").replace("tp: 4", "tp: -1")))
    assert [problem.line for problem in found] == [8, 12]


def test_helix_options_belong_to_helix_modes(write):
    text = GOOD.replace("mode: helix-gqa", "mode: standard-dcp") + "    helix: {allow_gqa_tpa1: true}\n"
    assert "go with a helix mode" in problems_of(write(text))[0].message


@pytest.mark.parametrize("text", ["", "[1, 2]", "just words", "[" * 5000])
def test_other_documents_are_refused(write, text):
    assert problems_of(write(text))


def test_large_files_are_refused_unread(write):
    assert "larger than 256 KiB" in problems_of(write("#" * (LIMIT_BYTES + 1)))[0].message


def test_binary_and_absent_files_are_refused(write, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in problems_of(path)[0].message
    assert "cannot be read" in problems_of(tmp_path / "absent.yaml")[0].message


def test_unknown_suite_names_list_the_known_ones(tmp_path):
    with pytest.raises(SuiteError, match=r"did you mean 'helix-gqa'.*allowed: faults, helix-gqa, helix-mla"):
        load_all(["helix-gqq"])
    assert load_all([], folder=tmp_path) == []


def test_a_path_is_a_suite_too(write):
    assert load_all([str(write(GOOD))])[0].name == "mine"


def test_the_published_schema_is_current():
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema(), (
        "write it anew: python -c 'from harness.suite import *; import json; "
        'SCHEMA_FILE.write_text(json.dumps(json_schema(), indent=2) + "\\n")\''
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_suites_load_and_name_the_schema(path):
    assert load(path).name == path.stem
    first = path.read_text().splitlines()[0]
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == SCHEMA_FILE.resolve()


def test_the_six_suites_are_there():
    assert {"standard-tp", "standard-dcp", "helix-gqa", "helix-mla", "known-limitations", "smoke"} <= set(available())


def test_cpu_defaults_are_the_same_in_every_suite():
    """Of suites whose cells are compared: what is measured under load starts a baseline of its own."""
    suites = [yaml.safe_load(path.read_text()) for path in available().values()]
    found = [
        suite.get("defaults", {}).get("cpu")
        for suite in suites
        if not all("bench" in group for group in suite["groups"])
    ]
    assert len({json.dumps(value) for value in found if value}) == 1, "baselines would not be shared"


def test_declared_refusals_name_their_text():
    for suite in load_all():
        for group in suite.groups:
            if group.expect is Verdict.REJECTED:
                assert group.refusal, f"{suite.name}/{group.name}"


def test_a_nightly_suite_is_run_by_its_name_only(write, tmp_path):
    write(GOOD)
    write(GOOD.replace("name: mine", "name: long\nnightly: true"), "long.yaml")
    assert [suite.name for suite in load_all([], folder=tmp_path)] == ["mine"]
    assert [suite.name for suite in load_all(["long"], folder=tmp_path)] == ["long"]
    assert "faults" not in [suite.name for suite in load_all()]


def test_faults_need_a_mode_that_has_them_and_a_reason_where_they_cannot_be_caught(write):
    fault = GOOD + "    fault: [drop-shard, 'drop-shard:layer=1']\n"
    assert load(write(fault)).groups[0].fault == ("drop-shard", "drop-shard:layer=1")
    says = [problem.message for problem in problems_of(write(fault + "    expect: pass\n"))]
    assert any("needs a 'why'" in said for said in says)
    says = [problem.message for problem in problems_of(write(fault.replace("helix-gqa", "standard-tp")))]
    assert any("'fault' goes with a context-parallel mode" in said for said in says)
