"""OFT (arXiv 2306.07280, 2506.19847), PEFT's own: the input of a layer turned by a block-diagonal rotation."""

from peft import OFTConfig

from fura_rl.adapters.methods.method import AdapterMethod

METHOD = AdapterMethod(
    config_class=OFTConfig,
    summary="block-diagonal rotation of the input",
    paper="arXiv 2306.07280",
    paper_learning_rate=8e-4,
    rate_of="OFTv2's paper (LLaMA-2-7B, mathematics)",
    limits="cannot change the singular values of a weight; block sizes must divide the input width; the rotation comes "
    "from a truncated series, which is exact for small angles only",
    capacity="oft_block_size",
)
