"""Capture one model of each of many families, to see which operators are missing. No training; needs timm and transformers.

python examples/bridge/sweep.py [NAME ...]
"""

import sys
import warnings
from collections.abc import Callable

import torch
from models import without_compiled_operators
from torch import nn

from modula_agd import ModulaError, from_torch

VISION = (
    "mobilenetv3_small_050 efficientnet_b0 densenet121 vgg11 vgg11_bn inception_v3 regnetx_002 regnety_002 resnext50_32x4d seresnet18 "
    "res2net50d swin_tiny_patch4_window7_224 mixer_s32_224 deit_tiny_patch16_224 cait_xxs24_224 levit_128s poolformer_s12 "
    "convmixer_768_32 coatnet_0_rw_224 maxvit_tiny_rw_224 efficientformer_l1 ghostnet_050 hrnet_w18_small nfnet_l0 resnetv2_50 "
    "beit_base_patch16_224 eva02_tiny_patch14_224 crossvit_tiny_240 pvt_v2_b0 twins_svt_small visformer_tiny volo_d1_224 "
    "xcit_nano_12_p16_224 edgenext_xx_small fastvit_t8 mobilevit_xxs repvgg_a0 tiny_vit_5m_224 vit_tiny_r_s16_p8_224 gcresnet33ts "
    "botnet26t_256 halonet26t lambda_resnet26t davit_tiny focalnet_tiny_srf inception_next_atto mambaout_femto hiera_tiny_224 rdnet_tiny "
    "starnet_s1"
)
"""Names in timm."""
CAUSAL = "OPT GPTNeoX Mistral Qwen2 Qwen3 Phi Phi3 Gemma Gemma2 Mixtral Falcon Bloom Cohere Olmo2 StableLm GPTJ Mamba Starcoder2 Granite"
ENCODERS = "Roberta Albert Electra DebertaV2 MPNet ModernBert DistilBert XLMRoberta FNet ConvBert"
"""Families in transformers."""
SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = (
    "Mistral",
    "Qwen2",
    "Qwen3",
    "Phi3",
    "Gemma",
    "Gemma2",
    "Mixtral",
    "Olmo2",
    "StableLm",
    "Starcoder2",
    "Cohere",
    "Granite",
)
OWN = {
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "Gemma": {"head_dim": 8},
    "Gemma2": {"head_dim": 8},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "Albert": {"embedding_size": 16},
    "ModernBert": {"cls_token_id": 1, "sep_token_id": 2},
}
"""What a family's configuration takes besides."""


def of_timm(name: str) -> tuple[nn.Module, object]:
    import timm

    model = timm.create_model(name, num_classes=10)
    side = model.default_cfg.get("input_size", (3, 224, 224))[1]
    return model, torch.randn(2, 3, side, side)


def of_transformers(name: str, kind: str) -> tuple[nn.Module, object]:
    import transformers

    transformers.logging.set_verbosity_error()
    grouped = {"num_key_value_heads": 2} if name in GROUPED else {}
    configuration = getattr(transformers, f"{name}Config")(**{**SMALL, **grouped, **OWN.get(name, {})})
    return getattr(transformers, f"{name}{kind}")(configuration), {"input_ids": torch.randint(3, 99, (2, 16))}


def main() -> None:
    warnings.simplefilter("ignore")
    without_compiled_operators()
    torch.set_num_threads(1)
    makers: dict[str, Callable[[], tuple[nn.Module, object]]] = {
        **{name: lambda name=name: of_timm(name) for name in VISION.split()},
        **{name: lambda name=name: of_transformers(name, "ForCausalLM") for name in CAUSAL.split()},
        **{name: lambda name=name: of_transformers(name, "ForSequenceClassification") for name in ENCODERS.split()},
    }
    for name in sys.argv[1:] or makers:
        torch.manual_seed(0)
        model, example = makers[name]()
        try:
            network = from_torch(model, example)
        except ModulaError as error:
            print(f"{name:32} {type(error).__name__}: {error}", flush=True)
            continue
        left = sorted(dict(model.named_parameters()).keys() - network.weights().keys())
        print(f"{name:32} D {float(network.bound().depth):6.1f}  unreached: {', '.join(left) or 'none'}", flush=True)


if __name__ == "__main__":
    main()
