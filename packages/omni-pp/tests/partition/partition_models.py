"""All small models of diffusers that are cut in tests."""

from __future__ import annotations

import partition_images as images
import partition_videos as videos
from partition_case import PartitionCase

_SIX = (("transformer_blocks", 6),)
_DOUBLE_SINGLE = (("transformer_blocks", 3), ("single_transformer_blocks", 4))

CASES: dict[str, PartitionCase] = {
    "Allegro": PartitionCase(videos.allegro, videos.allegro_call, _SIX),
    "AuraFlow": PartitionCase(
        images.auraflow, images.auraflow_call, (("joint_transformer_blocks", 3), _DOUBLE_SINGLE[1])
    ),
    "CogVideoX": PartitionCase(videos.cogvideox, videos.cogvideox_call, _SIX),
    "Flux": PartitionCase(images.flux, images.flux_call, _DOUBLE_SINGLE),
    "Flux2": PartitionCase(images.flux2, images.flux2_call, _DOUBLE_SINGLE),
    "HunyuanImage": PartitionCase(images.hunyuan_image, images.hunyuan_image_call, _DOUBLE_SINGLE),
    "HunyuanVideo": PartitionCase(videos.hunyuan_video, videos.hunyuan_video_call, _DOUBLE_SINGLE),
    "HunyuanVideo, token replace": PartitionCase(
        lambda: videos.hunyuan_video("token_replace"), videos.hunyuan_video_call, _DOUBLE_SINGLE
    ),
    "LTX": PartitionCase(videos.ltx, videos.ltx_call, _SIX),
    "LTX2": PartitionCase(videos.ltx2, videos.ltx2_call, _SIX),
    "Lumina2": PartitionCase(images.lumina2, images.lumina2_call, (("layers", 6),)),
    "Mochi": PartitionCase(videos.mochi, videos.mochi_call, _SIX),
    "PixArt": PartitionCase(images.pixart, images.pixart_call, _SIX),
    "QwenImage": PartitionCase(images.qwen_image, images.qwen_image_call, _SIX),
    "SD3": PartitionCase(images.sd3, images.sd3_call, _SIX),
    "Sana": PartitionCase(images.sana, images.sana_call, _SIX),
    "Wan": PartitionCase(videos.wan, videos.wan_call, (("blocks", 6),)),
    "ZImage": PartitionCase(images.z_image, images.z_image_call, (("layers", 6),)),
}
