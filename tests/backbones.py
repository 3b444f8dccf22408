"""Every KerasHub backbone in a small configuration, with random weights."""

import keras_hub
from keras_hub import layers, models

TEXT = {"vocabulary_size": 50, "num_layers": 2, "hidden_dim": 16}
HEADS = {"num_heads": 2, "intermediate_dim": 32}
SEQUENCE = {"max_sequence_length": 12}
DECODER = {
    **TEXT,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_dim": 32,
}
GEMMA = {**DECODER, "head_dim": 4}
EXPERTS = {"num_experts": 4, "top_k": 2}
SMOLLM = {
    **TEXT,
    "intermediate_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, True],
    "layer_types": ["attention", "attention"],
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 32,
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
}
QWEN3_5 = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
T5GEMMA = {"vocabulary_size": 50} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "layer_types": ["full_attention"] * 2,
    }.items()
}
T5GEMMA |= {"query_pre_attn_scalar": 1.0, "cross_attention_hidden_size": 16}
IMAGE = {"image_shape": (32, 32, 3)}
VIT = {"patch_size": 8, "num_layers": 2, "hidden_dim": 16, **HEADS, **IMAGE}
RESNET = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [3],
    "stackwise_num_filters": [64, 8, 8, 8],
    "stackwise_num_blocks": [1, 1, 1, 1],
    "stackwise_num_strides": [1, 2, 2, 2],
    "block_type": "basic_block",
    "image_shape": (64, 64, 3),
}
MIT = {
    "layerwise_depths": [1, 1],
    "num_layers": 2,
    "layerwise_num_heads": [1, 2],
    "layerwise_sr_ratios": [2, 1],
    "max_drop_path_rate": 0.0,
    "layerwise_patch_sizes": [7, 3],
    "layerwise_strides": [4, 2],
    "image_shape": (32, 32, 3),
    "hidden_dims": [8, 16],
}
HGNET = {
    "stem_channels": [3, 8, 8],
    "stackwise_stage_filters": [
        [8, 8, 16, 1, 3, 3],
        [16, 8, 16, 1, 3, 3],
        [16, 8, 32, 1, 3, 5],
        [32, 8, 32, 1, 3, 5],
    ],
    "apply_downsample": [False, True, True, True],
    "use_lightweight_conv_block": [False, False, True, True],
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "embedding_size": 8,
    "use_learnable_affine_block": True,
    "hidden_act": "relu",
    "image_shape": (64, 64, 3),
}
MOBILENET_V5 = {
    f"stackwise_{name}": values
    for name, values in {
        "block_types": [["er"], ["uir", "uir"]],
        "num_blocks": [1, 2],
        "num_filters": [[8], [16, 16]],
        "strides": [[2], [2, 1]],
        "act_layers": [["relu"], ["relu", "relu"]],
        "exp_ratios": [[2.0], [2.0, 2.0]],
        "se_ratios": [[0.0], [0.0, 0.0]],
        "dw_kernel_sizes": [[0], [5, 5]],
        "dw_start_kernel_sizes": [[0], [0, 0]],
        "dw_end_kernel_sizes": [[0], [0, 0]],
        "exp_kernel_sizes": [[3], [0, 0]],
        "pw_kernel_sizes": [[1], [0, 0]],
        "num_heads": [[0], [0, 0]],
        "key_dims": [[0], [0, 0]],
        "value_dims": [[0], [0, 0]],
        "kv_strides": [[0], [0, 0]],
        "use_cpe": [[False], [False, False]],
    }.items()
} | {"use_msfa": False, "image_shape": (32, 32, 3)}

CONFIGURATIONS = {
    "AlbertBackbone": {**TEXT, **HEADS, **SEQUENCE, "embedding_dim": 8},
    "BartBackbone": {**TEXT, **HEADS, **SEQUENCE},
    "BertBackbone": {**TEXT, **HEADS, **SEQUENCE},
    "BloomBackbone": {**TEXT, **HEADS},
    "DebertaV3Backbone": {**TEXT, **HEADS, **SEQUENCE, "bucket_size": 6},
    "DistilBertBackbone": {**TEXT, **HEADS, **SEQUENCE},
    "ElectraBackbone": {
        "vocab_size": 50,
        "num_layers": 2,
        "hidden_dim": 16,
        "embedding_dim": 16,
        **HEADS,
        **SEQUENCE,
    },
    "EdRecBackbone": {
        "vocab_size": 50,
        "num_layers_enc": 2,
        "num_layers_dec": 1,
        "hidden_dim": 16,
        **HEADS,
    },
    "ESMBackbone": {**TEXT, **HEADS},
    "ESM2Backbone": {**TEXT, **HEADS},
    "FalconBackbone": {**TEXT, "num_attention_heads": 4, "intermediate_dim": 32},
    "FNetBackbone": {**TEXT, **SEQUENCE, "intermediate_dim": 32},
    "GemmaBackbone": GEMMA,
    "Gemma3Backbone": {**GEMMA, "image_size": 16},
    "Gemma3nBackbone": {
        "text_vocab_size": 50,
        "text_hidden_size": 16,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": [32, 32],
        "hidden_activation": "gelu_approximate",
        "layer_types": ["full_attention"] * 2,
        "sliding_window": 4,
        "rope_theta": 1e4,
        "max_position_embeddings": 16,
        "vocab_size_per_layer_input": 50,
        "hidden_size_per_layer_input": 2,
        "altup_num_inputs": 2,
        "laurel_rank": 1,
    },
    "Gemma4Backbone": {**GEMMA, "image_size": 16},
    "GPT2Backbone": {**TEXT, **HEADS, **SEQUENCE},
    "GPTNeoXBackbone": {**TEXT, **HEADS, **SEQUENCE},
    "GptOssBackbone": {**DECODER, **EXPERTS},
    "LlamaBackbone": DECODER,
    "Llama3Backbone": DECODER,
    "MistralBackbone": {**DECODER, "sliding_window": 6},
    "MixtralBackbone": {**DECODER, **EXPERTS},
    "OPTBackbone": {**TEXT, **HEADS, **SEQUENCE},
    "Phi3Backbone": DECODER,
    "QwenBackbone": {**DECODER, "use_sliding_window_attention": False},
    "Qwen2Backbone": {**DECODER, "use_sliding_window_attention": False},
    "Qwen3Backbone": {**GEMMA, "sliding_window_size": None},
    "Qwen3MoeBackbone": {
        **DECODER,
        **EXPERTS,
        "moe_intermediate_dim": 8,
        "head_dim": 4,
    },
    "Qwen3_5Backbone": {**GEMMA, **QWEN3_5, "head_dim": 8},
    "Qwen3_5MoeBackbone": {
        **TEXT,
        **EXPERTS,
        **QWEN3_5,
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "moe_intermediate_dim": 8,
        "shared_expert_intermediate_size": 8,
    },
    "QwenMoeBackbone": {
        **DECODER,
        **EXPERTS,
        "moe_intermediate_dim": 8,
        "shared_expert_intermediate_dim": 8,
    },
    "RobertaBackbone": {**TEXT, **HEADS, **SEQUENCE},
    "RoformerV2Backbone": {**TEXT, **HEADS, "head_size": 8},
    "RWKV7Backbone": {
        "vocabulary_size": 50,
        "hidden_size": 16,
        "num_layers": 2,
        "head_size": 8,
        "intermediate_dim": 32,
    },
    "SmolLMBackbone": SMOLLM,
    "SmolLM3Backbone": SMOLLM,
    "T5Backbone": {**TEXT, **HEADS},
    "T5GemmaBackbone": T5GEMMA,
    "T5Gemma2Backbone": T5GEMMA,
    "XLMRobertaBackbone": {**TEXT, **HEADS, **SEQUENCE},
    "XLNetBackbone": {**TEXT, **HEADS},
    # images
    "CSPNetBackbone": {
        "stem_filters": 8,
        "stem_kernel_size": 3,
        "stem_strides": 1,
        "stackwise_depth": [1, 1],
        "stackwise_strides": [1, 2],
        "stackwise_num_filters": [8, 16],
        "block_type": "dark_block",
        "stage_type": "dark",
        "image_shape": (32, 32, 3),
    },
    "DeiTBackbone": VIT,
    "DenseNetBackbone": {"stackwise_num_repeats": [2, 2], "image_shape": (64, 64, 3)},
    "DINOV2Backbone": {**VIT, "position_embedding_shape": (32, 32)},
    "DINOV3Backbone": VIT,
    "EfficientNetBackbone": {
        "stackwise_kernel_sizes": [3, 3],
        "stackwise_num_repeats": [1, 1],
        "stackwise_input_filters": [8, 8],
        "stackwise_output_filters": [8, 16],
        "stackwise_expansion_ratios": [1, 4],
        "stackwise_squeeze_and_excite_ratios": [0.0, 0.25],
        "stackwise_strides": [1, 2],
        "stackwise_block_types": ["fused", "unfused"],
        "stackwise_force_input_filters": [0, 0],
        "stackwise_nores_option": [False, False],
        "width_coefficient": 1.0,
        "depth_coefficient": 1.0,
        "image_shape": (32, 32, 3),
    },
    "HGNetV2Backbone": HGNET,
    "MiTBackbone": MIT,
    "MobileNetBackbone": {
        "stackwise_expansion": [[8, 16], [16, 16]],
        "stackwise_num_blocks": [2, 2],
        "stackwise_num_filters": [[8, 8], [16, 16]],
        "stackwise_kernel_size": [[3, 3], [5, 5]],
        "stackwise_num_strides": [[2, 1], [2, 1]],
        "stackwise_se_ratio": [[None, None], [0.25, 0.25]],
        "stackwise_activation": [["relu", "relu"], ["hard_swish", "hard_swish"]],
        "stackwise_padding": [[1, 1], [2, 2]],
        "output_num_filters": 32,
        "depthwise_filters": 8,
        "depthwise_stride": 2,
        "depthwise_residual": False,
        "last_layer_filter": 32,
        "input_num_filters": 8,
        "input_activation": "hard_swish",
        "output_activation": "hard_swish",
        "squeeze_and_excite": 0.5,
        "image_shape": (64, 64, 3),
    },
    "MobileNetV5Backbone": MOBILENET_V5,
    "ResNetBackbone": RESNET,
    "SwinTransformerBackbone": {
        "embed_dim": 8,
        "depths": (1, 1),
        "num_heads": (1, 2),
        "window_size": 4,
        **IMAGE,
    },
    "VGGBackbone": {
        "stackwise_num_repeats": [1, 1],
        "stackwise_num_filters": [8, 16],
        **IMAGE,
    },
    "ViTBackbone": {
        "patch_size": (8, 8),
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": 16,
        "mlp_dim": 32,
        **IMAGE,
    },
    "ViTDetBackbone": {
        "hidden_size": 16,
        "num_layers": 2,
        **HEADS,
        "global_attention_layer_indices": [1],
        "patch_size": 8,
        "num_output_channels": 8,
        "window_size": 2,
        **IMAGE,
    },
    "XceptionBackbone": {
        "stackwise_conv_filters": [[8, 16], [16, 16]],
        "stackwise_pooling": [True, False],
        "image_shape": (64, 64, 3),
    },
    # video and audio
    "VideoPrismBackbone": {
        "num_frames": 2,
        "patch_size": 8,
        "hidden_dim": 16,
        **HEADS,
        "num_spatial_layers": 1,
        "num_temporal_layers": 1,
        "num_auxiliary_layers": 0,
        **IMAGE,
    },
    "MoonshineBackbone": {
        "vocabulary_size": 50,
        "filter_dim": 16,
        "encoder_num_layers": 1,
        "decoder_num_layers": 1,
        "hidden_dim": 16,
        "intermediate_dim": 32,
        "encoder_num_heads": 2,
        "decoder_num_heads": 2,
    },
    "WhisperBackbone": {
        **TEXT,
        **HEADS,
        "max_encoder_sequence_length": 16,
        "max_decoder_sequence_length": 16,
    },
    # images and text
    "PaliGemmaBackbone": {
        **GEMMA,
        "image_size": 16,
        "vit_patch_size": 8,
        "vit_num_heads": 2,
        "vit_hidden_dim": 8,
        "vit_intermediate_dim": 16,
        "vit_num_layers": 1,
    },
    # diffusion
    "FluxBackbone": {
        "input_channels": 16,
        "hidden_size": 32,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [4, 6, 6],
        "theta": 10_000,
        "use_bias": True,
        "guidance_embed": True,
        "image_shape": (8, 16),
        "text_shape": (8, 32),
        "image_ids_shape": (8, 3),
        "text_ids_shape": (8, 3),
        "y_shape": (32,),
    },
}


def tower(kind, side):
    """One encoder of a CLIP, MetaCLIP2 or SigLIP model."""
    sizes = {"hidden_dim": 16, "num_layers": 2, **HEADS}
    if side == "Vision":
        sizes |= {"patch_size": 8, **IMAGE}
    else:
        sizes |= {"vocabulary_size": 50, "embedding_dim": 16, **SEQUENCE}
    return getattr(models, f"{kind}{side}Encoder")(**sizes)


def two_towers(kind, **kwargs):
    return getattr(models, f"{kind}Backbone")(
        vision_encoder=tower(kind, "Vision"), text_encoder=tower(kind, "Text"), **kwargs
    )


def resnet(**kwargs):
    return models.ResNetBackbone(**RESNET | kwargs)


def blip2(images=False):
    """images: with what turns them into four tokens."""
    from keras_hub.src.models.blip2.blip2_custom_opt import BLIP2CustomOPT
    from keras_hub.src.models.blip2.blip2_qformer import BLIP2QFormer
    from keras_hub.src.models.blip2.blip2_vision_encoder import BLIP2VisionEncoder

    language = BLIP2CustomOPT(
        **TEXT,
        **HEADS,
        num_query_tokens=4 if images else 0,
        dropout=0.0,
        max_sequence_length=12,
        qformer_hidden_dim=16,
    )
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 24}
    encoder = images and BLIP2VisionEncoder(
        **sizes,
        image_size=16,
        patch_size=8,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
    )
    qformer = images and BLIP2QFormer(
        **sizes,
        num_query_tokens=4,
        vision_dim=16,
        cross_attention_frequency=2,
        dropout=0.0,
        layer_norm_epsilon=1e-6,
    )
    return models.BLIP2Backbone(
        vision_encoder=encoder or None,
        qformer=qformer or None,
        language_model=language,
    )


def d_fine():
    return models.DFineBackbone(
        backbone=models.HGNetV2Backbone(
            **HGNET, out_features=["stage3", "stage4"], name="encoder"
        ),
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_denoising=0,
        num_labels=4,
        hidden_dim=16,
        learn_initial_query=False,
        num_queries=6,
        anchor_image_size=(64, 64),
        feat_strides=[16, 32],
        num_feature_levels=2,
        encoder_in_channels=[32, 32],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=16,
        num_encoder_layers=1,
        hidden_expansion=0.34,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=8,
        num_lqe_layers=2,
        out_features=["stage3", "stage4"],
        image_shape=(64, 64, 3),
        seed=0,
    )


def depth_anything():
    encoder = models.DINOV2Backbone(
        **{
            **VIT,
            "num_layers": 4,
            "image_shape": (64, 64, 3),
            "position_embedding_shape": (64, 64),
        }
    )
    return models.DepthAnythingBackbone(
        image_encoder=encoder,
        reassemble_factors=[4, 2, 1, 0.5],
        neck_hidden_dims=[8, 8, 8, 8],
        fusion_hidden_dim=8,
        head_hidden_dim=8,
        head_in_index=-1,
        feature_keys=["stage1", "stage2", "stage3", "stage4"],
    )


def parseq():
    encoder = models.ViTBackbone(
        image_shape=(16, 32, 3),
        patch_size=(4, 8),
        num_layers=1,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=32,
        use_class_token=False,
    )
    return models.PARSeqBackbone(
        image_encoder=encoder,
        vocabulary_size=50,
        max_label_length=12,
        decoder_hidden_dim=16,
        num_decoder_layers=1,
        num_decoder_heads=2,
        decoder_mlp_dim=32,
        dropout_rate=0.0,
        attention_dropout=0.0,
    )


def sam():
    encoder = models.ViTDetBackbone(
        **{
            **CONFIGURATIONS["ViTDetBackbone"],
            "image_shape": (64, 64, 3),
            "patch_size": 16,
        }
    )
    return models.SAMBackbone(
        image_encoder=encoder,
        prompt_encoder=layers.SAMPromptEncoder(
            hidden_size=8,
            image_embedding_size=(4, 4),
            input_image_size=(64, 64),
            mask_in_channels=8,
        ),
        mask_decoder=layers.SAMMaskDecoder(
            num_layers=1,
            hidden_size=8,
            intermediate_dim=16,
            num_heads=2,
            embedding_dim=8,
            num_multimask_outputs=3,
            iou_head_depth=2,
            iou_head_hidden_dim=8,
        ),
    )


def sam3():
    sizes = {"hidden_dim": 32, "intermediate_dim": 32, "num_heads": 2}
    image = {"image_shape": (56, 56, 3), "patch_size": 14}
    return models.SAM3PromptableConceptBackbone(
        vision_encoder=layers.SAM3VisionEncoder(
            **sizes,
            **image,
            num_layers=2,
            fpn_hidden_dim=32,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(28, 28, 3),
            window_size=2,
            global_attn_indexes=[1],
        ),
        text_encoder=layers.SAM3TextEncoder(
            **sizes, vocabulary_size=50, embedding_dim=32, num_layers=1
        ),
        geometry_encoder=layers.SAM3GeometryEncoder(**sizes, num_layers=1, roi_size=7),
        detr_encoder=layers.SAM3DetrEncoder(**sizes, num_layers=1),
        detr_decoder=layers.SAM3DetrDecoder(
            **sizes, **image, num_layers=1, num_queries=4
        ),
        mask_decoder=layers.SAM3MaskDecoder(
            num_upsampling_stages=3, hidden_dim=32, num_heads=2
        ),
    )


def stable_diffusion_3():
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    def text_encoder(name, size):
        return models.CLIPTextEncoder(
            50, size, size, 2, 2, 32, "quick_gelu", -2, name=name
        )

    return models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=1,
        mmdit_num_heads=2,
        mmdit_position_size=32,
        mmdit_qk_norm=None,
        mmdit_dual_attention_indices=None,
        vae=VAEBackbone(
            [32] * 4, [1] * 4, [32] * 4, [1] * 4, sampler_method="mode", name="vae"
        ),
        clip_l=text_encoder("clip_l", 16),
        clip_g=text_encoder("clip_g", 32),
        image_shape=(64, 64, 3),
    )


# Those that are made of other models.
BUILDERS = {
    "BASNetBackbone": lambda: models.BASNetBackbone(
        image_encoder=resnet(
            input_conv_filters=[64],
            input_conv_kernel_sizes=[7],
            stackwise_num_filters=[64, 128, 256, 512],
            image_shape=(None, None, 3),
        ),
        num_classes=1,
        image_shape=(64, 64, 3),
    ),
    "BLIP2Backbone": blip2,
    "CLIPBackbone": lambda: two_towers("CLIP", projection_dim=16),
    "DeepLabV3Backbone": lambda: models.DeepLabV3Backbone(
        image_encoder=resnet(),
        projection_filters=8,
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P5",
        upsampling_size=8,
        dilation_rates=[2, 3],
        image_shape=(64, 64, 3),
    ),
    "DepthAnythingBackbone": depth_anything,
    "DFineBackbone": d_fine,
    "MetaCLIP2Backbone": lambda: two_towers("MetaCLIP2", projection_dim=16),
    "PARSeqBackbone": parseq,
    "RetinaNetBackbone": lambda: models.RetinaNetBackbone(
        image_encoder=resnet(),
        min_level=3,
        max_level=5,
        use_p5=False,
        image_shape=(64, 64, 3),
    ),
    "SAMBackbone": sam,
    "SAM3PromptableConceptBackbone": sam3,
    "SegFormerBackbone": lambda: models.SegFormerBackbone(
        image_encoder=models.MiTBackbone(**MIT), projection_filters=8
    ),
    "SigLIPBackbone": lambda: two_towers("SigLIP"),
    "StableDiffusion3Backbone": stable_diffusion_3,
}
# A base class: every image backbone is one.
ABSTRACT = ("Backbone", "FeaturePyramidBackbone")


def names():
    """Every backbone that this KerasHub has, so that none is forgotten."""
    return [
        name
        for name in sorted(dir(keras_hub.models), key=str.lower)
        if name.endswith("Backbone") and name not in ABSTRACT
    ]


def backbone(name):
    if name in BUILDERS:
        return BUILDERS[name]()
    return getattr(models, name)(**CONFIGURATIONS[name])
