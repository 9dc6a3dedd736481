"""The time line starts what may start, waits for what must be there, and says where the time went."""

import dataclasses

import pytest
import torch

from gptoss_dist.config import TrainConfig
from gptoss_dist.engine import EngineSettings
from gptoss_dist.model.config import ModelConfig
from gptoss_dist.planner.hardware import find_gpu, find_network
from gptoss_dist.planner.timing.fusion import fuse
from gptoss_dist.planner.timing.kinds import Kind, kind_of, moved_bytes
from gptoss_dist.planner.timing.prices import DatasheetHardware, collective_s, price
from gptoss_dist.planner.timing.roofline import COMPUTE, StepTime, extrapolate, simulate
from gptoss_dist.planner.tracing.recorder import Operator
from gptoss_dist.planner.tracing.trace import Trace, Workload, trace_step
from gptoss_dist.planner.tracing.work import matrix_flops
from gptoss_dist.train.objectives import next_token_prediction


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Hardware on which an operator takes as many seconds as it reads bytes, or a collective as it sends bytes."""

    name: str = "test"
    launch_s: float = 0.0
    host_sync_s: float = 0.0
    runs_ahead: bool = True
    network_share: float = 1.0

    def compute_s(self, operator: Operator) -> float:
        return float(operator.read)

    def link_s(self, kind: str, sent: float, processes: int) -> float:
        return sent


def compute(seconds: int, reads=(), writes=(), name="aten.mm.default", phase="forward") -> Operator:
    return Operator(name, phase, 0, seconds, 0, torch.bfloat16, (), tuple(reads), tuple(writes))


def collective(name: str, seconds: float, reads, writes=(), dtype=torch.bfloat16) -> Operator:
    return Operator(f"c10d.{name}.default", "forward", 0, 0, 0, dtype, (), tuple(reads), tuple(writes), (0, 1), seconds)


def step_of(*operators: Operator, **hardware) -> StepTime:
    return simulate(Trace(list(operators), [], 0, {}, None), Seconds(**hardware))


def starts(step: StepTime) -> list[float]:
    return [event.start for event in step.events]


def test_an_exchange_is_exposed_and_a_gather_of_the_next_block_is_not():
    exchanged = step_of(compute(5, writes=[1]), collective("alltoall_base_", 3, reads=[2, 1]), compute(4, reads=[2]))
    assert exchanged.seconds == 12 and exchanged.exposed == {"all-to-all": 3}
    gathered = step_of(
        collective("_allgather_base_", 3, [1], [2]),
        compute(1, [2], [3], "fsdp.split_with_sizes_copy.default"),
        collective("_allgather_base_", 3, [4], [5]),
        compute(5, [3]),
        compute(1, [5], [6], "fsdp.split_with_sizes_copy.default"),
        compute(5, [6]),
    )
    assert starts(gathered) == [0, 3, 3, 4, 9, 10]
    assert gathered.seconds == 15 and gathered.exposed_s == 3  # the first gather only


def test_one_gather_is_ahead_and_packing_does_not_hold_computation_up():
    blocks = [
        operator
        for n in range(3)
        for operator in (
            compute(1, [10 * n], [10 * n + 1], "aten._foreach_copy_.default"),
            collective("_allgather_base_", 1, [10 * n + 1], [10 * n + 2]),
            compute(10, [10 * n + 2], [10 * n + 3]),
        )
    ]
    step = step_of(*blocks)
    gathers = [event.start for event in step.events if event.label == "all-gather"]
    # The third waits for the first to be read, which ends with the first block, at 12.
    assert gathers == [1, 2, 12]
    assert step.seconds == 32 and step.by_phase["forward"] == 30


def test_only_the_update_waits_for_reduced_gradients():
    step = step_of(
        compute(2, writes=[1], phase="backward"),
        collective("_reduce_scatter_base_", 7, [1], [2]),
        compute(3, [9], [8], phase="backward"),
        compute(1, [2, 7], [7], "aten.add_.Tensor", phase="backward"),
        compute(4, [9], [8], phase="backward"),
        compute(1, [7], [7], "aten._fused_adamw_.default", phase="update"),
    )
    added = step.events[3]
    assert added.start == 9 and added.stream != COMPUTE
    assert step.events[4].start == 5, "the next gradient does not wait for the addition"
    assert step.events[5].start == 10 and step.seconds == 11


def test_the_host_limits_small_operators_and_waits_for_counts():
    step = step_of(*[compute(1) for _ in range(10)], launch_s=2.0)
    assert step.seconds == 21 and step.kernels == 10
    assert step.host_bound == 2 + 9 * 1
    on_cpu = step_of(*[compute(1) for _ in range(10)], launch_s=2.0, runs_ahead=False)
    assert on_cpu.seconds == 10 and on_cpu.host_bound == 0
    counts = collective("alltoall_base_", 1, reads=[2, 1], dtype=None)
    waiting = step_of(compute(8, writes=[1]), counts, compute(1), launch_s=1.0, host_sync_s=5.0)
    # 1 + 8 until the counts may leave, 1 on the way, 5 to notice, 1 to launch.
    assert starts(waiting)[-1] == 16


def test_collectives_use_the_ports_of_a_node_and_an_exchange_its_own():
    gpu, network = DatasheetHardware(find_gpu("h100-80gb"), link_latency_s=0.0), find_network("ib-400")
    network = dataclasses.replace(network, latency_s=0.0)

    def seconds(name: str, ranks) -> float:
        operator = collective(name, 1e9, [0, 1])._replace(group=tuple(ranks))
        return collective_s(operator, gpu, network, node_size=8)

    link, port = 450e9, 50e9 * 0.85
    assert seconds("_allgather_base_", range(8)) == pytest.approx(1e9 / (link * 0.80))
    assert seconds("alltoall_base_", range(8)) == pytest.approx(1e9 / (link * 0.70))
    assert seconds("_allgather_base_", range(64)) == pytest.approx(1e9 / (8 * port))
    assert seconds("alltoall_base_", range(64)) == pytest.approx(1e9 * 56 / 63 / port)
    assert seconds("allreduce_", range(0, 64, 8)) == pytest.approx(1e9 / port)
    # A step of a ring: whoever is at a border sends all of it out. A halo goes half to each neighbour.
    to_next, to_both = (0.0, 1e9, *[0.0] * 14), (0.0, 5e8, *[0.0] * 13, 5e8)
    for by_distance, out in ((to_next, 1e9), (to_both, 5e8)):
        operator = collective("alltoall_base_", 1e9, [0, 1])._replace(group=tuple(range(16)), by_distance=by_distance)
        assert collective_s(operator, gpu, network, node_size=8) == pytest.approx(out / port)
        operator_within = operator._replace(group=tuple(range(8)), by_distance=(*by_distance[:7], by_distance[-1]))
        assert collective_s(operator_within, gpu, None, node_size=8) == pytest.approx(1e9 / (link * 0.80))
        assert sum(operator.leaving(8)) == pytest.approx(2e9)  # two borders, or a half at four
    with pytest.raises(ValueError, match="network=None, but a collective joins 2 nodes of 4; name the network"):
        collective_s(collective("allreduce_", 1.0, [0])._replace(group=tuple(range(8))), gpu, None, node_size=4)


@pytest.mark.parametrize(
    ("name", "read", "written", "kind", "moved"),
    [
        ("aten.mul.Tensor", 20, 10, Kind.MEMORY, 30),
        ("aten.mul.out", 30, 10, Kind.MEMORY, 30),
        ("aten.softmax.int_out", 20, 10, Kind.EXPONENTIAL, 20),
        ("aten.copy_.default", 20, 10, Kind.MEMORY, 20),
        ("aten.index_select.default", 1000, 10, Kind.GATHER, 20),
        ("aten.scatter_add_.default", 120, 100, Kind.GATHER, 40),
        ("aten.sort.stable", 10, 30, Kind.SORT, 40),
        ("aten._fused_adamw_.default", 40, 40, Kind.OPTIMIZER, 70),
        ("aten.empty_like.default", 10, 10, Kind.NOTHING, 20),
        ("profiler._record_function_enter_new.default", 0, 0, Kind.NOTHING, 0),
    ],
)
def test_what_limits_an_operator_and_what_it_moves(name, read, written, kind, moved):
    operator = Operator(name, "forward", 0, read, written, torch.float32, (), (), ())
    assert kind_of(operator) is kind and moved_bytes(operator) == moved


def test_prices_are_the_roofline():
    gpu = find_gpu("h100-80gb")
    hardware = DatasheetHardware(gpu)
    product = Operator("aten.mm.default", "forward", 10**14, 10**6, 10**6, torch.bfloat16, (), (), ())
    assert price(product, hardware) == pytest.approx(1e14 / (gpu.bf16 * gpu.efficiency.gemm))
    thin = product._replace(flops=10**9, read=10**10)
    assert price(thin, hardware) == pytest.approx((1e10 + 1e6) / (gpu.memory_bytes_per_s * 0.85))
    assert price(product._replace(dtype=torch.float32), hardware) > 10 * price(product, hardware)
    assert price(product._replace(flops=0, read=0, written=0), hardware) == gpu.efficiency.kernel_launch_s
    experts = product._replace(name="aten._grouped_mm.default", shapes=((64, 8), (4, 8, 8), (4,)))
    assert price(experts, hardware) == pytest.approx(1e14 / (gpu.bf16 * gpu.efficiency.grouped_gemm))
    assert price(experts._replace(shapes=((64, 8), (1, 8, 8), (1,))), hardware) == price(product, hardware)


def test_compiled_blocks_read_once_and_write_what_is_used_later():
    def elementwise(reads, writes) -> Operator:
        shapes = tuple((5,) for _ in reads)
        return Operator("aten.mul.Tensor", "forward", 0, 20 * len(reads), 20, torch.float32, shapes, reads, writes)

    chain = [elementwise((1, 2), (3,)), elementwise((3, 1), (4,)), elementwise((4,), (5,))]
    chain.append(compute(1, [5, 3])._replace(flops=1))
    (one, product) = fuse(chain)
    assert (one.read, one.written) == (40, 40), "1 and 2 are read, 3 and 5 are used later, 4 is not"
    assert product is chain[-1]
    assert fuse([operator._replace(phase="update") for operator in chain[:3]])[0].name == "aten.mul.Tensor"


@pytest.mark.slow  # tests/planner/tracing/test_reduced.py has it with more settings
def test_a_deep_model_follows_from_two_shallow_ones():
    steps = {layers: _traced(layers) for layers in (2, 4, 6)}
    deep = extrapolate(steps[2], steps[4], (2, 4), 6)
    assert deep.seconds == pytest.approx(steps[6].seconds, rel=0.01)
    assert deep.kernels == steps[6].kernels
    for kind, seconds in steps[6].by_kind.items():
        assert deep.by_kind[kind] == pytest.approx(seconds, rel=0.01), kind
    assert steps[6].exposed["all-to-all"] > 0 and steps[6].host_bound_share < 1


def _traced(layers: int) -> StepTime:
    model = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_scaling=None,
    )
    settings = EngineSettings(model, TrainConfig(micro_batch_size=1, precision="bf16"))
    settings.parallel.expert_parallel = 4
    trace = trace_step(settings, Workload(256, 4, next_token_prediction, (9, 0)))
    return simulate(trace, DatasheetHardware(find_gpu("h100-80gb")))


def test_products_into_a_sum_count():
    out, a, b = torch.zeros(4, 6), torch.zeros(4, 5), torch.zeros(5, 6)
    assert matrix_flops(torch.ops.aten.addmm_.default, (out, a, b), {}, [out]) == 2 * 4 * 5 * 6
