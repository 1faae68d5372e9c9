"""Reading compiled programs and estimating their time: small programs, worked out by hand."""

import importlib

import numpy as np
import pytest

from moma_jax.plan.topology import KINDS

compiler, estimate, memory_use, hlo, network = (
    importlib.import_module(f"moma_jax.plan.{name}") for name in ("compile", "estimate", "memory_use", "hlo", "network")
)

# Reading --------------------------------------------------------------------------------------------------------------

PROGRAM = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

%slice_of (p: f32[8,1024,1024], i: s32[]) -> f32[1024,1024] {
  %p = f32[8,1024,1024]{2,1,0:T(8,128)} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,1024,1024]{2,1,0:T(8,128)} dynamic-slice(%p, %i, %zero, %zero), dynamic_slice_sizes={1,1024,1024}
  ROOT %two = f32[1024,1024]{1,0:T(8,128)} bitcast(%one)
}

%inner_body (t: (s32[], f32[8,1024,1024])) -> (s32[], f32[8,1024,1024]) {
  %t = (s32[], f32[8,1024,1024]{2,1,0:T(8,128)}) parameter(0)
  %n = s32[]{:S(6)} get-tuple-element(%t), index=0
  %by = s32[]{:S(6)} constant(1)
  %n.next = s32[]{:S(6)} add(%n, %by)
  %w = f32[8,1024,1024]{2,1,0:T(8,128)} get-tuple-element(%t), index=1
  %fusion.1 = f32[1024,1024]{1,0:T(8,128)S(1)} fusion(%w, %n), kind=kLoop, calls=%slice_of, metadata={op_name="x"}, \
backend_config={"window_config":{"estimated_cycles":"1000"}}
  %gone = (f32[1024,1024]{1,0:T(8,128)S(1)}, f32[1024,1024]{1,0:T(8,128)}, u32[]) copy-start(%fusion.1)
  %come = f32[1024,1024]{1,0:T(8,128)} copy-done(%gone)
  ROOT %next = (s32[], f32[8,1024,1024]{2,1,0:T(8,128)}) tuple(%n.next, %w)
}

%inner_test (t2: (s32[], f32[8,1024,1024])) -> pred[] {
  %t2 = (s32[], /*index=1*/f32[8,1024,1024]{2,1,0:T(8,128)}) parameter(0)
  %limit = s32[] constant(8)
  %k = s32[] get-tuple-element(%t2), index=0
  ROOT %less = pred[] compare(%k, %limit), direction=LT
}

%outer_body (s: (s32[], f32[8,1024,1024], s32[])) -> (s32[], f32[8,1024,1024], s32[]) {
  %s = (s32[], f32[8,1024,1024]{2,1,0:T(8,128)}, s32[]) parameter(0)
  %from = s32[] constant(2)
  %turn = s32[]{:S(6)} get-tuple-element(%s), index=0
  %more = s32[]{:S(6)} constant(1)
  %turn.next = s32[]{:S(6)} add(%turn, %more)
  %u = f32[8,1024,1024]{2,1,0:T(8,128)} get-tuple-element(%s), index=1
  %init = (s32[], f32[8,1024,1024]{2,1,0:T(8,128)}) tuple(%from, %u)
  %inner = (s32[], f32[8,1024,1024]{2,1,0:T(8,128)}) while(%init), condition=%inner_test, body=%inner_body
  ROOT %again = (s32[], f32[8,1024,1024]{2,1,0:T(8,128)}, s32[]) tuple(%turn.next, %u, %from)
}

%outer_test (s2: (s32[], f32[8,1024,1024], s32[])) -> pred[] {
  %s2 = (s32[], f32[8,1024,1024]{2,1,0:T(8,128)}, s32[]) parameter(0)
  %at = s32[] get-tuple-element(%s2), index=0
  %end = s32[] get-tuple-element(%s2), index=2
  ROOT %less2 = pred[] compare(%at, %end), direction=LT
}

ENTRY %main (x: f32[8,1024,1024]) -> f32[8,1024,1024] {
  %x = f32[8,1024,1024]{2,1,0:T(8,128)} parameter(0)
  %zero2 = s32[] constant(0)
  %three = s32[] constant(3)
  %copy.9 = s32[] copy(%three)
  %start = (s32[], f32[8,1024,1024]{2,1,0:T(8,128)}, s32[]) tuple(%zero2, %x, %copy.9)
  %outer = (s32[], f32[8,1024,1024]{2,1,0:T(8,128)}, s32[]) while(%start), condition=%outer_test, body=%outer_body
  ROOT %y = f32[8,1024,1024]{2,1,0:T(8,128)} get-tuple-element(%outer), index=1
}
"""


def test_loops_their_turns_and_arrays_are_read():
    module = hlo.parse(PROGRAM)
    turns = {loop.name: module.trips(computation, loop) for computation, loop in module.loops()}
    assert turns == {"inner": 6, "outer": 3}, "from 2 to 8; from 0 to a limit that enters with the tuple"
    (array,) = hlo.arrays("bf16[4,100,200]{2,1,0:T(8,128)(2,1)S(1)}")
    assert (array.shape, array.nbytes, array.padded_bytes, array.in_hbm) == ((4, 100, 200), 160000, 212992, False)
    assert [a.nbytes for a in hlo.arrays("(pred[8]{0:T(8)}, s4[8], f8e4m3fn[8], s32[])")] == [8, 4, 8, 4]


def test_known_trip_counts_and_those_that_nobody_knows():
    known = PROGRAM.replace("body=%inner_body", 'body=%inner_body, backend_config={"known_trip_count":{"n":"5"}}')
    unknown = PROGRAM.replace("compare(%k, %limit), direction=LT", "compare(%k, %limit), direction=NE")
    by_two = PROGRAM.replace("%by = s32[]{:S(6)} constant(1)", "%by = s32[]{:S(6)} constant(2)")
    doubled = PROGRAM.replace("add(%n, %by)", "add(%n, %n)")
    elsewhere = PROGRAM.replace("%from = s32[] constant(2)", "%from = s32[] get-tuple-element(%s), index=2")
    for text, expected in ((known, 5), (unknown, None), (by_two, 3), (doubled, None), (elsewhere, None)):
        module = hlo.parse(text)
        assert {i.name: module.trips(c, i) for c, i in module.loops()}["inner"] == expected
    layout = network.MeshLayout({"data": 1}, np.zeros((1, 4), int), (1, 1, 1), np.zeros(1, int))
    assert len(estimate.estimate(hlo.parse(unknown), layout, KINDS["v5p"]).unknown_loops) == 1


def test_what_the_forward_pass_keeps_is_what_its_loop_stacks():
    text = """HloModule m

%body (t: (s32[], f32[6,8,100], bf16[6,8,128], f32[6,8,128])) -> (s32[], f32[6,8,100], bf16[6,8,128], f32[6,8,128]) {
  %t = (s32[], f32[6,8,100]{2,1,0:T(8,128)}, bf16[6,8,128]{2,1,0}, f32[6,8,128]{2,1,0}) parameter(0)
  %one = s32[] constant(1)
  %i = s32[] get-tuple-element(%t), index=0
  %j = s32[] add(%one, %i)
  %kept = f32[6,8,100]{2,1,0:T(8,128)} get-tuple-element(%t), index=1
  %weights = f32[6,8,128]{2,1,0} get-tuple-element(%t), index=3
  %new = (f32[6,8,100]{2,1,0:T(8,128)}, bf16[6,8,128]{2,1,0}) fusion(%kept), kind=kLoop, calls=%nothing
  %a = f32[6,8,100]{2,1,0:T(8,128)} get-tuple-element(%new), index=0
  %b = bf16[6,8,128]{2,1,0} get-tuple-element(%new), index=1
  ROOT %r = (s32[], f32[6,8,100]{2,1,0:T(8,128)}, bf16[6,8,128]{2,1,0}, f32[6,8,128]{2,1,0}) tuple(%j, %a, %b, %weights)
}

%test (u: (s32[], f32[6,8,100], bf16[6,8,128], f32[6,8,128])) -> pred[] {
  %u = (s32[], f32[6,8,100]{2,1,0:T(8,128)}, bf16[6,8,128]{2,1,0}, f32[6,8,128]{2,1,0}) parameter(0)
  %n = s32[] get-tuple-element(%u), index=0
  %six = s32[] constant(6)
  ROOT %less = pred[] compare(%n, %six), direction=LT
}

ENTRY %main (x: s32[]) -> s32[] {
  %x = s32[] parameter(0)
  %zero = s32[] constant(0)
  %k0 = f32[6,8,100]{2,1,0:T(8,128)} broadcast(%x)
  %b0 = bf16[6,8,128]{2,1,0} broadcast(%x)
  %w0 = f32[6,8,128]{2,1,0} broadcast(%x)
  %in = (s32[], f32[6,8,100]{2,1,0:T(8,128)}, bf16[6,8,128]{2,1,0}, f32[6,8,128]{2,1,0}) tuple(%zero, %k0, %b0, %w0)
  %loop = (s32[], f32[6,8,100]{2,1,0:T(8,128)}, bf16[6,8,128]{2,1,0}, f32[6,8,128]{2,1,0}) while(%in), \
condition=%test, body=%body, metadata={op_name="jit(train_step)/jvp(Decoder)/Decoder.in_layers/while"}
  ROOT %y = s32[] get-tuple-element(%loop), index=0
}
"""
    module = hlo.parse(text)
    assert memory_use.kept_bytes(module, 6) == 6 * 8 * 128 * 4 + 6 * 8 * 128 * 2, (
        "tiles are padded; weights only pass through"
    )
    assert memory_use.kept_bytes(module, 5) is None, "another loop"


@pytest.mark.parametrize(
    ("complaint", "expected"),
    [
        ("total memory required for HLO temporaries (2.5G) exceeds available HBM (15.75G).", 2.5 * 2**30),
        ("Ran out of memory in memory space hbm. Used 20.00M of 15.75G hbm.", 20 * 2**20),
        ("something else", None),
    ],
)
def test_what_the_compiler_says_is_needed(complaint, expected):
    assert compiler.needed_bytes(complaint) == expected


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("HloModule nothing")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, d", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, d", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, d", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, d", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, d", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_every_form_of_replica_groups(text, expected):
    assert network.device_groups(text, 4).tolist() == expected


GROUPS = "channel_id=7, replica_groups={{0,1},{2,3}}"
COLLECTIVES = f"""HloModule m, is_scheduled=true

%started (p0: bf16[64,128]) -> (bf16[64,128], bf16[128,128], u32[]) {{
  %p0 = bf16[64,128]{{1,0}} parameter(0)
  %g0 = bf16[128,128]{{1,0}} all-gather(%p0), {GROUPS}, dimensions={{0}}, frontend_attributes={{chain_id="1"}}
  ROOT %c0 = (bf16[64,128], bf16[128,128], u32[]) custom-call(%g0), custom_call_target="AsyncCollectiveStart"
}}

%carried (p1: bf16[64,128]) -> bf16[64,128] {{
  %p1 = bf16[64,128]{{1,0}} parameter(0)
  ROOT %g1 = bf16[64,128]{{1,0}} all-gather(%p1), {GROUPS}, dimensions={{0}}, frontend_attributes={{chain_id="1"}}
}}

%finished (p2: bf16[64,128]) -> bf16[128,128] {{
  %p2 = bf16[64,128]{{1,0}} parameter(0)
  %g2 = bf16[128,128]{{1,0}} all-gather(%p2), {GROUPS}, dimensions={{0}}, frontend_attributes={{chain_id="1"}}
  ROOT %c2 = bf16[128,128]{{1,0}} custom-call(%p2, %g2), custom_call_target="AsyncCollectiveDone"
}}

%scattered (p3: f32[256]) -> f32[128] {{
  %p3 = f32[256]{{0}} parameter(0)
  %r3 = f32[256]{{0}} all-reduce(%p3), channel_id=8, replica_groups={{{{0,2}},{{1,3}}}}, to_apply=%add
  %i3 = s32[] constant(0)
  ROOT %d3 = f32[128]{{0}} dynamic-slice(%r3, %i3), dynamic_slice_sizes={{128}}
}}

ENTRY %main (x: bf16[64,128], z: f32[256]) -> f32[128] {{
  %x = bf16[64,128]{{1,0}} parameter(0)
  %z = f32[256]{{0}} parameter(1)
  %go = (bf16[64,128]{{1,0}}, bf16[128,128]{{1,0}}, u32[]) fusion(%x), kind=kCustom, calls=%started
  %on = bf16[64,128]{{1,0}} fusion(%x), kind=kOutput, calls=%carried, backend_config={{"estimated_cycles":"100"}}
  %end = bf16[128,128]{{1,0}} fusion(%x), kind=kCustom, calls=%finished
  %ags = (bf16[64,128]{{1,0}}, bf16[256,128]{{1,0}}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={{0}}
  %agd = bf16[256,128]{{1,0}} all-gather-done(%ags)
  %a2a = bf16[64,128]{{1,0}} all-to-all(%x), channel_id=9, replica_groups=[2,2]<=[4], dimensions={{0}}
  ROOT %rs = f32[128]{{0}} fusion(%z), kind=kCustom, calls=%scattered
}}
"""
LINE = network.MeshLayout(
    {"data": 2, "expert": 2}, np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0], [1, 1, 0]]), (2, 2), np.zeros(4)
)


def test_collectives_are_counted_once_by_kind_and_axes():
    result = estimate.estimate(hlo.parse(COLLECTIVES), LINE, KINDS["v5e"])
    block = 64 * 128 * 2
    assert result.collective_bytes == {
        "all-gather": {"expert": block, "data x expert": 3 * block},
        "all-to-all": {"expert": block / 2},
        "reduce-scatter": {"data": 256 * 4 / 2},
    }


def test_only_what_runs_between_start_and_done_hides_a_collective():
    result = estimate.estimate(hlo.parse(COLLECTIVES), LINE, KINDS["v5e"])
    busy = sum(c.seconds for c in result.costs if c.unit == "network")
    hidden = next(c.seconds for c in result.costs if c.name == "on")
    assert hidden == pytest.approx(100 / KINDS["v5e"].clock, rel=1e-6)
    assert result.exposed["network"] == pytest.approx(busy - hidden)
    assert result.seconds == pytest.approx(busy)


def test_the_bandwidth_table_by_hand():
    b, hop = KINDS["v5p"].link, network.LATENCY
    ring = network.MeshLayout({"fsdp": 4}, np.array([[i, 0, 0, 0] for i in range(4)]), (4, 4, 4), np.zeros(4))
    line = ring._replace(extents=(4, 2, 2))
    two = network.MeshLayout({"data": 2}, np.zeros((2, 4), int), (2, 2, 1), np.array([0, 1]))

    def seconds(kind, layout, devices=(0, 1, 2, 3)):
        asked = network.Collective(kind, "sync", "", 10**9, devices, ("fsdp",))
        return network.seconds(asked, layout, KINDS["v5p"])

    assert seconds("all-gather", ring) == pytest.approx(3e9 / (2 * b) + 2 * hop)
    assert seconds("all-gather", line) == pytest.approx(3e9 / b + 3 * hop)
    assert seconds("all-reduce", ring) == pytest.approx(2 * 0.75e9 / (2 * b) + 2 * hop)
    assert seconds("all-to-all", ring) == pytest.approx(1e9 * 4 / (8 * b) + 2 * hop)
    assert seconds("all-to-all", line) == pytest.approx(1e9 * 4 / (4 * b) + 3 * hop)
    assert seconds("all-gather", two, (0, 1)) == pytest.approx(1e9 / 6.25e9 + hop)
    assert seconds("all-gather", line, (0, 2)) == pytest.approx(1e9 / (b / 2) + hop), "two groups share the links"


def test_the_step_by_hand():
    one = network.MeshLayout({"data": 1}, np.zeros((1, 4), int), (1, 1, 1), np.zeros(1, int))
    kind = KINDS["v5p"]
    result = estimate.estimate(hlo.parse(PROGRAM), one, kind)
    block, turns = 4 * 1024 * 1024, 18
    assert result.by("category") == {"copies": pytest.approx(turns * block / kind.bandwidth + 8 / kind.bandwidth)}, (
        "the slice, not the stack of eight; nothing is written to HBM"
    )
    assert result.seconds == pytest.approx((2 * turns * block + 8) / kind.bandwidth), "the copy back is waited for"
    assert result.exposed["copies"] == pytest.approx(turns * block / kind.bandwidth)
    assert [c.turns for c in result.costs if c.name == "fusion.1"] == [turns]


def test_sorts_gathers_and_scatters_have_a_model():
    text = """HloModule m

ENTRY %main (k: f32[4,1024], x: bf16[4096,512], i: s32[2048,1], u: bf16[2048,512]) -> bf16[4096,512] {
  %k = f32[4,1024]{1,0} parameter(0)
  %x = bf16[4096,512]{1,0} parameter(1)
  %i = s32[2048,1]{1,0:S(1)} parameter(2)
  %u = bf16[2048,512]{1,0} parameter(3)
  %s = (f32[4,1024]{1,0}, s32[4,1024]{1,0}) sort(%k, %k), dimensions={1}, to_apply=%less
  %g = bf16[2048,512]{1,0} gather(%x, %i), offset_dims={1}, slice_sizes={1,512}
  ROOT %t = bf16[4096,512]{1,0} scatter(%x, %i, %u), update_window_dims={1}, to_apply=%add
}
"""
    one = network.MeshLayout({"data": 1}, np.zeros((1, 4), int), (1, 1, 1), np.zeros(1, int))
    kind = KINDS["v5e"]
    seconds = estimate.estimate(hlo.parse(text), one, kind).by("category")
    assert seconds["sort"] == pytest.approx(10 * 11 / 2 * 4 * 2 * estimate.SORT_CYCLES / kind.clock)
    assert seconds["gather"] == pytest.approx(max(2 * 2048 * 4 * 512 / kind.bandwidth, 2048 * 8 / kind.clock))
    assert seconds["scatter"] == pytest.approx(max(3 * 2048 * 4 * 512 / kind.bandwidth, 2048 * 8 / kind.clock))


KERNEL = """HloModule m

ENTRY %main (m: s8[1,8,8], q: bf16[2,4,1024,64]) -> bf16[2,4,1024,64] {
  %m = s8[1,8,8]{2,1,0} parameter(0)
  %q = bf16[2,4,1024,64]{3,2,1,0} parameter(1)
  ROOT %splash_mha_fwd_residuals.1 = bf16[2,4,1024,64]{3,2,1,0} custom-call(%m, %q, %q, %q), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 256, \\"block_kv\\": 256}"
}}, metadata={op_name="jit(train_step)/jvp(Decoder)/while/layers/attention/pallas_call"}
}
"""


def test_kernels_have_a_model_or_are_named():
    one = network.MeshLayout({"data": 1}, np.zeros((1, 4), int), (1, 1, 1), np.zeros(1, int))
    kind = KINDS["v5e"]
    (known,) = estimate.estimate(hlo.parse(KERNEL), one, kind).costs
    products = 2 * 2 * 2 * 4 * 1024**2 * 128 * (4 + 1) / (2 * 4)
    assert known.seconds == pytest.approx(products / (estimate.MIDDLE.kernel_share * kind.peak))
    assert (known.category, known.part, known.source) == ("attention kernel", "attention", "roofline")
    backward = estimate.estimate(hlo.parse(KERNEL.replace("mha_fwd", "mha_dkv")), one, kind)
    assert backward.seconds == pytest.approx(2.5 * known.seconds)
    other = estimate.estimate(hlo.parse(KERNEL.replace("splash", "other")), one, kind)
    assert other.unknown_kernels == {"other_mha_fwd_residuals.1"}
    moved = (4 * 2 * 4 * 1024 * 64 * 2 + 64) / kind.bandwidth
    assert other.seconds == pytest.approx(estimate.COPY_SLOWDOWN * moved), "as slowly as the compiler copies"
    fast = estimate.estimate(hlo.parse(KERNEL.replace("splash", "other")), one, kind, estimate.FAST)
    assert fast.seconds == pytest.approx(moved)


def test_an_estimate_is_within_its_range():
    text = """HloModule m

ENTRY %main (x: f32[4096,100]) -> f32[4096,100] {
  %x = f32[4096,100]{1,0:T(8,128)} parameter(0)
  ROOT %y = f32[4096,100]{1,0:T(8,128)} copy(%x), backend_config={"estimated_cycles":"9000"}
}
"""
    one = network.MeshLayout({"data": 1}, np.zeros((1, 4), int), (1, 1, 1), np.zeros(1, int))
    kind = KINDS["v5e"]
    least, middle, most = (
        estimate.estimate(hlo.parse(text), one, kind, assumed).seconds
        for assumed in (estimate.FAST, estimate.MIDDLE, estimate.SLOW)
    )
    assert least == pytest.approx(2 * 4 * 4096 * 128 / kind.bandwidth), "100 columns take the place of 128"
    assert middle == most == pytest.approx(9000 / kind.clock)
    least, middle, most = (
        estimate.estimate(hlo.parse(KERNEL), one, kind, assumed).seconds
        for assumed in (estimate.FAST, estimate.MIDDLE, estimate.SLOW)
    )
    assert least < middle < most == pytest.approx(2 * least)


def test_collectives_between_slices_are_those_of_the_megascale_runtime():
    text = """HloModule m

ENTRY %main (x: f32[256,128]) -> f32[256,128] {
  %x = f32[256,128]{1,0} parameter(0)
  %t = token[] after-all()
  %recv.1 = (f32[256,128]{1,0}, u32[], token[]) recv(%t), channel_id=3, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="r",_xla_megascale_transfer_type="ALL_REDUCE"}
  %before = f32[256,128]{1,0} negate(%x), backend_config={"estimated_cycles":"1000000"}
  %send.1 = (f32[256,128]{1,0}, u32[], token[]) send(%x, %t), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="r",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done.1 = token[] send-done(%send.1), channel_id=4, is_host_transfer=true
  %recv-done.1 = (f32[256,128]{1,0}, token[]) recv-done(%recv.1), channel_id=3, is_host_transfer=true
  ROOT %y = f32[256,128]{1,0} get-tuple-element(%recv-done.1), index=0
}
"""
    two = network.MeshLayout(
        {"data": 2, "fsdp": 2}, np.array([[0, 0, 0], [0, 1, 0]] * 2), (2, 2), np.array([0, 0, 1, 1])
    )
    result = estimate.estimate(hlo.parse(text), two, KINDS["v5e"])
    size = 256 * 128 * 4
    assert result.collective_bytes == {"all-reduce": {"data": size}}
    busy = size / 3.125e9 + network.LATENCY
    assert result.exposed["network between slices"] == pytest.approx(busy), "what runs before the send hides nothing"
    assert result.seconds == pytest.approx(1e6 / KINDS["v5e"].clock + busy)


def test_only_the_slowest_branch_counts():
    text = """HloModule m

%much (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  ROOT %r = f32[1024]{0} all-reduce(%p), replica_groups={{0,1},{2,3}}, to_apply=%add
}

%little (q: f32[1024]) -> f32[1024] {
  %q = f32[1024]{0} parameter(0)
  ROOT %s = f32[1024]{0} negate(%q)
}

ENTRY %main (x: f32[1024], c: pred[]) -> f32[1024] {
  %x = f32[1024]{0} parameter(0)
  %c = pred[] parameter(1)
  ROOT %y = f32[1024]{0} conditional(%c, %x, %x), true_computation=%much, false_computation=%little
}
"""
    result = estimate.estimate(hlo.parse(text), LINE, KINDS["v5e"])
    assert result.collective_bytes == {"all-reduce": {"expert": 4096}} and [c.name for c in result.costs] == ["r"]
    assert result.seconds == pytest.approx(result.costs[0].seconds) == pytest.approx(result.exposed["network"])


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(train_step)/while/body/closed_call/jvp(Decoder)/while/body/layers/attention/dot_general", "attention"),
        ("jit(train_step)/transpose(jvp(Decoder))/while/body/closed_call/checkpoint/layers/ffn/shard_map", "ffn"),
        ("jit(train_step)/jvp(Decoder)/while", "layers"),
        ("jit(train_step)/jvp(Decoder)/Decoder.in_pairs/while", "layers"),
        ("jit(train_step)/while/body/closed_call/transpose(jvp(Decoder))/shard_map/scatter-add", "embedding"),
        ("jit(train_step)/while/body/closed_call/jvp()/shard_map/while/body/dot_general", "loss"),
        ("jit(train_step)/sqrt", "optimizer"),
    ],
)
def test_parts_of_the_model_by_name(op_name, part):
    assert estimate.part_of(op_name) == part
