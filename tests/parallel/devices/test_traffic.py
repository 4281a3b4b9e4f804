"""Bytes to and from main memory, instruction by instruction."""

import pytest

from jrlhf.parallel.devices.hlo import parse_hlo
from jrlhf.parallel.devices.traffic import memory_bytes

MOVES = """\
%part (w: f32[16,1024], i: s32[]) -> f32[1024] {
  %w = f32[16,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,1024]{1,0} dynamic-slice(%w, %i, %zero), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%row)
}

%into (w.1: f32[16,1024], i.1: s32[], u: f32[1,1024]) -> f32[16,1024] {
  %w.1 = f32[16,1024]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %u = f32[1,1024]{1,0} parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %all = f32[16,1024]{1,0} dynamic-update-slice(%w.1, %u, %i.1, %zero.1)
}

ENTRY %main (p: f32[16,1024], n: s32[], v: f32[1,1024]) -> f32[] {
  %p = f32[16,1024]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %v = f32[1,1024]{1,0} parameter(2)
  %near = f32[1,1024]{1,0:T(8,128)S(1)} copy(%v)
  %whole = f32[16,1024]{1,0} negate(%p)
  %both = f32[16,1024]{1,0} add(%p, %whole)
  %slice = f32[1024]{0} fusion(%p, %n), kind=kLoop, calls=%part
  %bare = f32[1,1024]{1,0} dynamic-slice(%p, %n, %n), dynamic_slice_sizes={1,1024}
  %update = f32[16,1024]{1,0} fusion(%p, %n, %v), kind=kLoop, calls=%into
  %inside = f32[16,1024]{1,0} fusion(%p, %n, %near), kind=kLoop, calls=%into
  %set = f32[16,1024]{1,0} dynamic-update-slice(%p, %v, %n, %n)
  %start = (f32[16,1024]{1,0:S(1)}, f32[16,1024]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %done = f32[16,1024]{1,0:S(1)} copy-done(%start)
  %send = (f32[1,1024]{1,0}, f32[1,1024]{1,0:S(1)}, u32[]{:S(2)}) collective-permute-start(%v), source_target_pairs={}
  %sent = f32[1,1024]{1,0:S(1)} collective-permute-done(%send)
  %sum = f32[1,1024]{1,0} all-reduce-start(%v), replica_groups={}, to_apply=%part
  %go = ((f32[16,1024]{1,0}, s32[], f32[1,1024]{1,0}), f32[16,1024]{1,0}, u32[]) fusion-start(%p, %n, %v), calls=%into
  ROOT %tuple = (f32[16,1024]{1,0}) tuple(%p)
}
"""


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("whole", 2 * 16 * 4096),
        ("both", 3 * 16 * 4096),
        ("near", 4096),
        ("slice", 2 * 4096 + 4),
        ("bare", 2 * 4096 + 2 * 4),
        ("update", 2 * 4096 + 4),
        ("inside", 4096 + 4),
        ("set", 2 * 4096),
        ("start", 16 * 4096),
        ("done", 0),
        ("send", 4096),
        ("sent", 0),
        ("go", 2 * 4096 + 2 * 4),
        ("sum", 2 * 4096),
        ("tuple", 0),
        ("p", 0),
    ],
)
def test_main_memory_sees_what_is_read_and_written(name: str, size: int) -> None:
    module = parse_hlo(MOVES)
    entry = module.computations["main"]
    assert memory_bytes(module, entry, entry[name]) == size
