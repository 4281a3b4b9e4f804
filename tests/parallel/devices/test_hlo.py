"""The parser of HLO: what each compiler writes, and what stands between its lines."""

import jax
import jax.numpy as jnp

from jrlhf.parallel.devices.hlo import arrays_of, parse_hlo, total_bytes

TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

FileNames
1 "step.py"

StackFrames
1 {file_name_id=1 function_name_id=1 line=9}

%fused (p.0: bf16[8,2]) -> bf16[8,2] {
  %p.0 = bf16[8,2]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %twice.1 = bf16[8,2]{1,0:T(8,128)(2,1)} add(%p.0, %p.0)
}, execution_thread="sparsecore"

ENTRY %main.2_spmd (p: bf16[8,2]) -> (bf16[8,2], f32[]) {
  %p = bf16[8,2]{1,0:T(8,128)(2,1)} parameter(0)
  %kernel.1 = (bf16[8,2]{1,0:T(8,128)(2,1)}, /*index=1*/f32[]{:S(6)}) custom-call(%p, /*index=1*/%p), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}", "depth": {
"a": 1
}
}}, metadata={op_name="jit(step)/attention (splash)"}, backend_config={"body":"TUz{"}
  %c = f32[2,2]{1,0} constant({ { 1, 2 }, {
    3, 4 } })
  %first.3 = bf16[8,2]{1,0:T(8,128)(2,1)} get-tuple-element(%kernel.1), index=0
  ROOT %out = (bf16[8,2]{1,0}, f32[]) fusion(%first.3), kind=kLoop, calls=%fused, \
backend_config={"estimated_cycles":"77"}
}
"""


def test_a_module_is_read_with_what_stands_between_its_lines() -> None:
    module = parse_hlo(TPU)
    assert (module.entry, module.devices) == ("main.2_spmd", 4)
    assert {name: [*body] for name, body in module.computations.items()} == {
        "fused": ["p.0", "twice.1"],
        "main.2_spmd": ["p", "kernel.1", "c", "first.3", "out"],
    }
    kernel, out = (module.computations["main.2_spmd"][name] for name in ("kernel.1", "out"))
    assert (kernel.opcode, kernel.operands, kernel.root) == ("custom-call", ["p", "p"], False)
    assert [(a.dtype, a.dims, a.in_main_memory) for a in kernel.arrays] == [
        ("bf16", (8, 2), True),
        ("f32", (), False),
    ]
    assert kernel.quoted("custom_call_target") == "tpu_custom_call"
    assert kernel.quoted("op_name") == "jit(step)/attention (splash)"
    assert (out.called, out.quoted("estimated_cycles"), out.quoted("op_name"), out.root) == (
        {"calls": "fused"},
        "77",
        "",
        True,
    )
    assert module.contains("main.2_spmd", frozenset({"add"}))
    assert not module.contains("main.2_spmd", frozenset({"dot"}))


def test_the_program_of_a_cpu_is_read_whole() -> None:
    compiled = jax.jit(lambda x: jnp.sin(x @ x).sum()).lower(jnp.zeros((4, 4))).compile()
    module = parse_hlo(compiled.as_text())
    opcodes = [i.opcode for computation in module.computations.values() for i in computation.values()]
    assert module.entry in module.computations
    assert {"parameter", "dot", "sine"} <= {*opcodes}
    assert all(sum(i.root for i in computation.values()) == 1 for computation in module.computations.values())


def test_arrays_have_the_bytes_of_their_types() -> None:
    arrays = arrays_of("(pred[3], bf16[2,4]{1,0}, f8e4m3fn[5], s64[], /*index=4*/u32[2], token[], c64[2])")
    assert [array.bytes for array in arrays] == [3, 16, 5, 8, 8, 16]
    assert total_bytes(arrays) == 56
    assert arrays[1].elements == 8
