"""The GPUs that the kernels are compiled for: what a program may use, and the rates that estimates are made with."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Chip:
    """One processor is an SM (NVIDIA) or a CU (AMD). Rates are peaks of the board named, dense, as its maker states them.

    registers: 32-bit, of a processor. shared_bytes: of a processor; one program may use `shared_limit_bytes` of them,
    and each takes `shared_reserved_bytes` more. matrix_tflops: by the operands of a product. cache_bytes_per_clock:
    from the second-level cache into one processor. special_per_clock: exponentials, reciprocals and the like.
    lanes_per_clock: of other arithmetic instructions.
    """

    board: str
    target: GPUTarget
    source: str
    num_processors: int
    clock_ghz: float
    threads: int
    programs: int
    registers: int
    register_granularity: int
    shared_bytes: int
    shared_limit_bytes: int
    shared_reserved_bytes: int
    matrix_tflops: dict[str, float]
    memory_gb_per_s: float
    cache_bytes_per_clock: int
    special_per_clock: int
    lanes_per_clock: int

    @property
    def warp(self) -> int:
        return self.target.warp_size


KIB = 1024
NVIDIA = {
    "threads": 2048,
    "programs": 32,
    "registers": 65536,
    "register_granularity": 8,
    "shared_reserved_bytes": KIB,
    "special_per_clock": 16,
}
# A 32-bit product on AMD is one; on NVIDIA it is one or three of TF32.
CHIPS = {
    "sm_80": Chip(
        board="A100-SXM4-80GB",
        target=GPUTarget("cuda", 80, 32),
        source="NVIDIA A100 Tensor Core GPU Architecture, whitepaper (5120 bytes a clock from the L2 cache); "
        "CUDA C Programming Guide, compute capability 8.0",
        num_processors=108,
        clock_ghz=1.41,
        shared_bytes=164 * KIB,
        shared_limit_bytes=163 * KIB,
        matrix_tflops={"bf16": 312.0, "tf32": 156.0},
        memory_gb_per_s=2039,
        cache_bytes_per_clock=5120 // 108,
        **NVIDIA,
        lanes_per_clock=64,
    ),
    "sm_90": Chip(
        board="H100-SXM5-80GB",
        target=GPUTarget("cuda", 90, 32),
        source="NVIDIA H100 Tensor Core GPU Architecture, whitepaper (1.83 GHz is the clock of its matrix "
        "rates); CUDA C Programming Guide, compute capability 9.0; the L2 cache's rate is not published "
        "and taken as A100's",
        num_processors=132,
        clock_ghz=1.83,
        shared_bytes=228 * KIB,
        shared_limit_bytes=227 * KIB,
        matrix_tflops={"bf16": 989.4, "tf32": 494.7},
        memory_gb_per_s=3352,
        cache_bytes_per_clock=5120 // 132,
        **NVIDIA,
        lanes_per_clock=128,
    ),
    "sm_100": Chip(
        board="B200-SXM-180GB",
        target=GPUTarget("cuda", 100, 32),
        source="NVIDIA HGX B200 data sheet; CUDA C Programming Guide, compute capability 10.0; clock from the "
        "matrix rate; the L2 cache's rate is not published and taken as H100's for each SM",
        num_processors=148,
        clock_ghz=1.85,
        shared_bytes=228 * KIB,
        shared_limit_bytes=227 * KIB,
        matrix_tflops={"bf16": 2250.0, "tf32": 1125.0},
        memory_gb_per_s=8000,
        cache_bytes_per_clock=5120 // 132,
        **NVIDIA,
        lanes_per_clock=128,
    ),
    "gfx942": Chip(
        board="MI300X",
        target=GPUTarget("hip", "gfx942", 64),
        source="AMD Instinct MI300X data sheet; AMD CDNA 3 white paper (an L2 cache of 2 KiB a clock for the 38 "
        "CUs of a die); AMD Instinct MI300 instruction set reference; packed arithmetic is not counted "
        "on",
        num_processors=304,
        clock_ghz=2.1,
        threads=2048,
        programs=16,
        # 512 vector registers for each lane of four SIMDs of 64 lanes; matrix accumulators count.
        registers=4 * 512 * 64,
        register_granularity=8,
        shared_bytes=64 * KIB,
        shared_limit_bytes=64 * KIB,
        shared_reserved_bytes=0,
        matrix_tflops={"bf16": 1307.4, "fp32": 163.4},
        memory_gb_per_s=5300,
        cache_bytes_per_clock=2048 // 38,
        special_per_clock=16,
        lanes_per_clock=64,
    ),
}
