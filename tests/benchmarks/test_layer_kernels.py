"""How kernels are sorted; the names are a GPU's."""

import pytest

from tests.benchmarks.layer_kernels import OTHER, Kernel, by_kind, kind_of, short

FILL = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<c10::BFloat16>>"
COPY = "void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda(at::Iter&)>"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("matrix products", "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT"),
        ("matrix products", "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16>"),
        ("matrix products", "void cublasLt::splitKreduce_kernel<32, 16>"),
        ("matrix products", "triton_tem_fused_mm_2"),
        ("Inductor's own", "triton_poi_fused__scaled_dot_product_flash_attention_mm_3"),
        ("attention", "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<int>"),
        ("attention", "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7"),
        ("copies and fills", "Memset (Device)"),
        ("copies and fills", FILL),
        ("copies and fills", COPY),
        (OTHER, "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>"),
    ],
)
def test_kinds(kind: str, name: str) -> None:
    assert kind_of(name) == kind


def test_kernels_are_summed_by_kind_and_none_is_lost() -> None:
    kernels = {
        "nvjet_1": Kernel(14, 900.0),
        "nvjet_2": Kernel(3, 70.0),
        "Memset (Device)": Kernel(2, 5.0),
        "unheard_of": Kernel(1, 2.0),
    }
    sums = by_kind(kernels)
    assert sums["matrix products"] == Kernel(17, 970.0)
    assert sums["attention"] == Kernel()
    assert sums[OTHER] == Kernel(1, 2.0)
    assert sum(sums.values(), Kernel()) == sum(kernels.values(), Kernel())


def test_short_names_tell_loops_apart() -> None:
    assert short(FILL) == "vectorized_elementwise_kernel: FillFunctor"
    assert short(COPY) == "elementwise_kernel: direct_copy_kernel_cuda"
    assert short("void cublasLt::splitKreduce_kernel<32, 16>") == "cublasLt::splitKreduce_kernel"
