"""The kernels compiled for GPUs that are not here: no spills, wide loads, tensor cores.

Here a sample (the first configuration of each kernel) for one target; ``make aot`` and ``make aot36`` compile all, for
every target, with the pinned Triton and with 3.6. CI has them compile what has changed, and a tenth of the rest.
"""

import importlib.util
import json
import os
import subprocess
import sys
from datetime import date
from types import SimpleNamespace

import pytest

from fedgram.bench import aot, aot_machine_code

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def compiled():
    """The output of the gate on the sample; Triton compiles only in a process that does not interpret."""
    return run_python("-m", "fedgram.bench.aot", "--sample", "--target", "sm100", "--jobs", "1")


def run_python(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


@pytest.mark.slow
def test_every_kernel_compiles_without_a_fault(compiled):
    assert compiled.returncode == 0, compiled.stderr
    lines = compiled.stdout.splitlines()
    kernels = {line[8:].split()[0] for line in lines if line.startswith("sm100")}
    assert len(lines) == len({id(c.kernel) for _, _, c in aot.shipped_configs("sm100")})
    assert {"factor_gram", "factor_combine", "lowrank_sum", "grad_gram", "grad_combine", "ghost_gram"} <= kernels


def test_every_launch_of_the_descent_is_the_one_that_the_gate_compiles():
    """Of classes of 16, 32, .. rows it spilled on every target, and the gate cannot see it: there ``n`` is a number."""
    kernel = "from fedgram.kernels._subset_select_triton import descend_kernel as kernel"
    done = run_python("-c", f"{kernel}; print([p.name for p in kernel.params if p.do_not_specialize])")
    assert done.stdout == "['n', 'm', 'most']\n", done.stderr


@pytest.mark.parametrize(("failures", "result"), [(0, "machine code"), (1, "machine code"), (2, None)])
def test_what_the_compiler_fails_at_is_compiled_once_more(monkeypatch, capsys, failures, result):
    errors = iter([RuntimeError("PassManager::run failed")] * failures)

    def compile_config(config, target):
        if (error := next(errors, None)) is not None:
            raise error
        return "machine code"

    monkeypatch.setattr(aot, "compile_config", compile_config)
    config = SimpleNamespace(name="some kernel")
    if result is None:
        with pytest.raises(RuntimeError, match="PassManager"):
            aot._compile_again(config, "sm100")
    else:
        assert aot._compile_again(config, "sm100") == result
    assert ("sm100 some kernel: PassManager::run failed: compiled once more" in capsys.readouterr().err) == (
        failures > 0
    )


def test_other_errors_of_the_compiler_are_findings_at_once(monkeypatch):
    calls = []
    monkeypatch.setattr(aot, "compile_config", lambda *_: calls.append(1) or int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        aot._compile_again(SimpleNamespace(name="some kernel"), "sm80")
    assert calls == [1]


BREAK = """
import dataclasses, json
from fedgram.bench import aot

def shipped(name):
    return next(c for _, _, c in aot.shipped_configs("sm80", name) if c.name == name)

gram, combine = shipped("factor_gram fp32 tile 64"), shipped("factor_combine bf16 rank 64 blocks")
variants = {
    "as shipped": gram,
    "hint dropped": dataclasses.replace(gram, constexprs=gram.constexprs | {"TALL_I": 1, "WIDE_I": 1}),
    "too few warps": dataclasses.replace(combine, num_warps=2),
}
rows = aot.measure([aot.compile_config(c, "sm80") for c in variants.values()], "sm80")
table = aot.read_table().get(aot.triton_version(), {}).get("sm80", {})
print(json.dumps({n: [aot.gate(c, "sm80", row, held) for held in (None, table.get(c.name))]
                  for (n, c), row in zip(variants.items(), rows)}))
"""


@pytest.mark.slow
def test_real_breakages_are_caught(tmp_path, monkeypatch):
    """A kernel without its alignment hint, and one with a quarter of the registers that it has."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    result = run_python("-c", BREAK)
    assert result.returncode == 0, result.stderr
    faults = json.loads(result.stdout)
    assert faults["as shipped"] == [[], []]
    by_rule, by_table = faults["hint dropped"]
    assert "no wide_loads" in by_rule
    assert any(f.startswith("wide_loads: 0, committed ") for f in by_table)
    for found in faults["too few warps"]:
        assert any(f.startswith("stack = ") for f in found)
        assert any(f.startswith("spills = ") for f in found)


class Config:
    tensor_cores, wide_loads = True, True


GOOD = {"registers": 100, "stack": 0, "spills": 0, "wide_loads": 8, "tensor_cores": 16}


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({}, []),
        ({"registers": 108}, []),
        ({"registers": 109}, ["registers: 109, committed 100"]),
        ({"stack": 8}, ["stack = 8"]),
        ({"spills": 3}, ["spills = 3"]),
        ({"spilled": 2}, ["spilled = 2"]),
        ({"tensor_cores": 0}, ["no tensor_cores", "tensor_cores: 0, committed 16"]),
        ({"wide_loads": 0}, ["no wide_loads", "wide_loads: 0, committed 8"]),
        ({"wide_loads": 7}, ["wide_loads: 7, committed 8"]),
    ],
)
def test_gate(change, faults):
    assert aot.gate(Config, "sm90", GOOD | change, GOOD) == faults


def test_gate_without_committed_figures_and_on_amd():
    assert aot.gate(Config, "sm90", GOOD | {"wide_loads": 7, "registers": 200}, None) == []
    assert aot.gate(Config, "gfx942", GOOD | {"wide_loads": 0}, GOOD) == []
    assert aot.gate(Config, "gfx942", GOOD | {"tensor_cores": 0}, None) == ["no tensor_cores"]


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_figures_are_committed(version):
    """All shipped configurations, on all targets, for both versions; none of them spills."""
    committed, names = aot.read_table()[version], {config.name for _, _, config in aot.shipped_configs("sm90")}
    for target in aot.TARGETS:
        assert set(committed[target]) == names, f"renew with python -P -m fedgram.bench.aot --write ({target})"
        for name, row in committed[target].items():
            assert row["stack"] == row["spills"] == row.get("spilled", 0) == 0, f"{target} {name}"


FINGERPRINTS = """
import dataclasses, json
from fedgram.bench import aot

by_name = {c.name: c for _, _, c in aot.shipped_configs("sm90")}
gram, other = by_name["factor_gram bf16 tile 32"], by_name["grad_gram fp32 tile 32"]
kinds = [
    gram,
    dataclasses.replace(gram, num_warps=2 * gram.num_warps),
    dataclasses.replace(gram, num_stages=7),
    dataclasses.replace(gram, constexprs=gram.constexprs | {"TALL_I": 1}),
    other,
]
found = [aot.fingerprint(c, "sm90") for c in kinds] + [aot.fingerprint(gram, "sm80")]
held = {t: {c.name: aot.read_table()[aot.triton_version()][t][c.name]["source"] == aot.fingerprint(c, t)
            for _, _, c in aot.shipped_configs(t)} for t in aot.TARGETS}
table = {"sm90": {"factor_gram bf16 tile 32": {"source": found[0]}}}
print(json.dumps([found, held, aot._is_due(gram, "sm90", table), aot._is_due(kinds[1], "sm90", table)]))
"""


def test_a_fingerprint_is_of_all_that_decides_the_code(monkeypatch):
    """Committed figures are of today's sources, and other options, constants, targets or kernels are told apart."""
    result = run_python("-c", FINGERPRINTS)
    assert result.returncode == 0, result.stderr
    found, held, same, other = json.loads(result.stdout)
    assert len(set(found)) == len(found)
    stale = [f"{target} {name}" for target, rows in held.items() for name, right in rows.items() if not right]
    assert not stale, "renew with make aot AOT='--changed --write' and make aot36 likewise"
    assert other
    today = date.today().toordinal()
    assert same == aot.due("factor_gram bf16 tile 32", "sm90", today)


def test_everything_is_compiled_within_days():
    for target in aot.TARGETS:
        for name in ("factor_gram bf16 tile 32", "grad_gram fp32 tile 32"):
            assert sum(aot.due(name, target, day) for day in range(700_000, 700_000 + aot.DAYS)) == 1


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        aot.main([])
    assert "nothing to compile in the interpreter" in capsys.readouterr().err


def test_sass_and_amdgcn_are_counted():
    """The patterns on lines as the tools print them."""
    sass = """
    /*0a50*/ LDGSTS.E.BYPASS.LTC128B.128.ZFILL [R5], [R2.64], P0 ;   /*0b*/ LDG.E.128 R4, [R2.64] ;
    /*0c*/ @P0 LDG.E.64 R4, [R2.64] ;   /*0d*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
    /*0e*/ HGMMA.64x64x16.F32.BF16 R24 ;
    /*0f*/ UTCHMMA gdesc[UR4] ;  /*10*/ STL.64 [R1], R4 ;  /*11*/ LDL R4, [R1] ;  /*12*/ DMMA.8x8x4 R4 ;
    """
    assert aot_machine_code.count(sass, aot_machine_code.SASS) == {
        "wide_loads": 2,
        "loads": 3,
        "tensor_cores": 4,
        "spills": 2,
    }
    amd = "global_load_dwordx4 v[0:3]\n buffer_load_dwordx4 v[0:3]\n global_load_ushort v1\n v_mfma_f32_16x16x16_bf16\n"
    counted = {"wide_loads": 2, "loads": 3, "tensor_cores": 1, "spills": 1}
    assert aot_machine_code.count(amd + "scratch_store_dword v0", aot_machine_code.AMDGCN) == counted


def test_instructions_that_are_not_disassembled_are_told():
    """Nothing may go uncounted: every 16 bytes of code must have come back as a line of its kernel."""
    line = "        /*{:04x}*/  STL [R1], R4 ;\n"
    sass = "".join(line.format(16 * i) for i in range(3))
    split = aot_machine_code._split
    assert [part.count("STL") for part in split(sass, [32, 16])] == [2, 1]
    with pytest.raises(RuntimeError, match="1 instructions disassembled of 2"):
        list(split(sass, [32, 32]))
