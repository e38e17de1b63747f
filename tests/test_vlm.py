"""Token packing against transformers' own processor, with Qwen's real token ids."""

import importlib.util
from pathlib import Path

import pytest
import torch

from halo.method.config import preset
from halo.method.vlm import (
    SPECIAL,
    Observation,
    installed_positions,
    pack,
    reference_inputs,
    rope_positions,
    special_ids,
    tiny_tokenizer,
)

QWEN_SPECIAL = [
    '<|endoftext|>',
    '<|im_start|>',
    '<|im_end|>',
    '<|object_ref_start|>',
    '<|object_ref_end|>',
    '<|box_start|>',
    '<|box_end|>',
    '<|quad_start|>',
    '<|quad_end|>',
    '<|vision_start|>',
    '<|vision_end|>',
    '<|vision_pad|>',
    '<|image_pad|>',
    '<|video_pad|>',
]
QWEN_PATTERN = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"""
    r"""|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
TEXTS = (
    'put the puck on the pad that flashed red',
    "open the top drawer, then place 2 apples; don't drop them!",
)


def qwen_tokenizer():
    "Qwen's tokenizer from the byte-pair ranks that the dashscope wheel holds."
    spec = importlib.util.find_spec('dashscope')
    if spec is None or importlib.util.find_spec('tiktoken') is None:
        pytest.skip("needs dashscope's byte-pair ranks: pip install -e '.[dev]'")
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = Path(spec.submodule_search_locations[0]) / 'resources/qwen.tiktoken'
    tok = TikTokenConverter(
        vocab_file=str(ranks), pattern=QWEN_PATTERN, extra_special_tokens=QWEN_SPECIAL
    ).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token='<|im_end|>', pad_token='<|endoftext|>'
    )


@pytest.fixture(scope='module', params=['tiny', 'qwen'])
def setup(request):
    if request.param == 'tiny':
        return preset('tiny'), tiny_tokenizer()
    return (
        preset('tiny', tokenizer='Qwen/Qwen2.5-VL-7B-Instruct', text__vocab=152064),
        qwen_tokenizer(),
    )


def observation(tok, n, size, views, texts, young):
    g = torch.Generator().manual_seed(n)
    b = len(texts)
    image = lambda *s: torch.randint(0, 256, s, generator=g, dtype=torch.uint8)
    mask = torch.ones(b, n, dtype=torch.bool)
    mask[1:, : max(n - young, 0)] = False
    there = torch.ones(b, len(views), dtype=torch.bool)
    there[1:, 1:] = False
    t = tok(list(texts), return_tensors='pt', padding=True, padding_side='right')
    return Observation(
        image(b, n, 3, size, size),
        mask,
        [image(b, 3, *v) for v in views],
        there,
        t['input_ids'],
        t['attention_mask'].bool(),
        torch.zeros(b, 8),
    )


def test_special_ids_are_the_tokenizers(setup):
    cfg, tok = setup
    assert special_ids(cfg.tokenizer) == {s: tok.convert_tokens_to_ids(s) for s in SPECIAL}


@pytest.mark.parametrize('n,young', [(0, 0), (1, 1), (2, 1), (7, 3), (8, 8), (80, 33)])
@pytest.mark.parametrize(
    'views', [(), ((56, 56),), ((84, 112), (56, 28)), ((112, 112), (28, 28), (56, 84))]
)
def test_packing_equals_the_processor(setup, n, young, views):
    """Pixel values, grids and token ids, bit for bit; the processor sees the same frames
    and text.
    """
    cfg, tok = setup
    obs = observation(tok, n, 28 if n > 8 else 56, views, TEXTS, young)
    p, fps = pack(obs, cfg), cfg.sampling.fps / cfg.sampling.history_stride
    pixels = {'_videos': (p.pixels_video, p.grid_video), '': (p.pixels_image, p.grid_image)}
    used = {k: [0, 0] for k in pixels}
    for i, text in enumerate(TEXTS):
        ref, m = reference_inputs(obs, i, text, tok, fps), p.attention_mask[i]
        assert (
            torch.equal(p.input_ids[i][m], ref['input_ids'][0])
            and m.sum() == ref['attention_mask'].sum()
        )
        assert not m[: (~m).sum()].any()  # padding stands on the left
        for kind, (px, grid) in pixels.items():
            if (want := ref.get(f'pixel_values{kind}')) is None:
                continue
            shape = ref['video_grid_thw' if kind else 'image_grid_thw']
            a, g = used[kind]
            assert torch.equal(px[a : a + len(want)], want) and torch.equal(
                grid[g : g + len(shape)], shape
            )
            used[kind] = [a + len(want), g + len(shape)]
    assert all(used[k] == [len(px), len(grid)] for k, (px, grid) in pixels.items())


@pytest.mark.parametrize(
    'views', [((56, 56),), ((84, 112), (56, 28)), ((112, 112), (28, 28), (56, 84))]
)
def test_positions_of_views_and_text_equal_get_rope_index(setup, views):
    cfg, tok = setup
    p = pack(observation(tok, 0, 56, views, TEXTS, 0), cfg)
    assert torch.equal(p.position_ids, installed_positions(p, cfg))


@pytest.mark.parametrize(
    't,h,w,seconds', [(1, 2, 2, 0.2), (4, 2, 2, 1.2), (40, 4, 4, 0.2), (5, 3, 6, 1.0)]
)
def test_video_positions_equal_an_independent_implementation(t, h, w, seconds):
    "The published rule, as transformers implements it for Qwen2.5-Omni."
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
        Qwen2_5OmniPreTrainedModelForConditionalGeneration as Omni,
    )

    interval = 2 * seconds
    want = Omni.get_llm_pos_ids_for_vision(
        None,
        3,
        0,
        1,
        (torch.arange(t) * interval).long(),
        torch.tensor([h]),
        torch.tensor([w]),
    )
    assert torch.equal(
        rope_positions((('text', 3), ('video', t, h, w)), interval)[:, 3:], want.long()
    )


def test_installed_positions_are_what_the_installed_model_computes():
    "`positions='installed'` hands the model get_rope_index's own answer, bug or not."
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    from halo.method.vlm import VLMEmbedding, qwen_config

    cfg = preset('tiny', sampling__positions='installed')
    obs = observation(tiny_tokenizer(), 4, 56, ((56, 56),), TEXTS, 3)
    p = pack(obs, cfg)
    ids = special_ids('tiny')
    qwen = Qwen2_5_VLModel(qwen_config(cfg))
    kinds = (p.input_ids == ids['<|image_pad|>']).int() + 2 * (
        p.input_ids == ids['<|video_pad|>']
    ).int()
    want, _ = qwen.get_rope_index(
        p.input_ids, kinds, p.grid_image, p.grid_video, [1.2] * 2, p.attention_mask.int()
    )
    with torch.no_grad():
        _, ctx = VLMEmbedding(qwen, cfg)(p)
    assert torch.equal(ctx.positions, want.amax(0))


@pytest.mark.gpu
def test_flash_attention_equals_sdpa():
    "The cache through flash-attn 2 and through SDPA, bfloat16, on a batch with padding."
    pytest.importorskip('flash_attn')
    from halo.method.vlm import build_qwen, encode, split_qwen

    cfg = preset('small', dtype='bfloat16', sampling__history_frames=4)
    obs, caches = (
        observation(tiny_tokenizer(), 4, 112, ((112, 112),), TEXTS, 3).to('cuda'),
        [],
    )
    for backend in ('flash_attention_2', 'sdpa'):
        torch.manual_seed(0)
        qwen = build_qwen(cfg).cuda()
        qwen.set_attn_implementation(backend)
        with torch.no_grad():
            cache, ctx = encode(*split_qwen(qwen, cfg), pack(obs, cfg))
        caches.append(cache)
    ok = ctx.valid[:, None, :, None]
    for a, b in zip(*caches):
        for x, y in zip(a, b):
            assert ((x - y).float() * ok).abs().max() < 0.02 * (y.float() * ok).abs().max()
