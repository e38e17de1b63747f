"""Weights from folders laid out as the hub's checkpoints are: both sizes of Qwen2.5-VL and
the language model of the expert, shrunken, in shards or whole, under old names and new,
with tied embeddings and a head of their own.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2ForCausalLM

from halo.method.config import preset
from halo.method.expert import expert_config
from halo.method.model import HaloModel
from halo.method.vlm import build_qwen, qwen_config

ROOT = Path(__file__).resolve().parent.parent
TEXT = dict(
    text__layers=3,
    text__mlp=96,
    text__vocab=512,
    text__mrope_section=(4, 6, 6),
    vision__depth=3,
    vision__width=96,
    vision__heads=3,
    vision__mlp=192,
    vision__full_attention=(1,),
    tokenizer='tiny',
)
# heads of 32 channels; all else in the proportions of the preset
WIDTHS = dict(
    paper=dict(text__width=224, text__heads=7, text__kv_heads=1)
    | dict(expert__width=192, expert__heads=6, expert__kv_heads=2, expert__mlp=160),
    base=dict(text__width=256, text__heads=8, text__kv_heads=2)
    | dict(expert__width=192, expert__heads=6, expert__kv_heads=2, expert__mlp=128),
)


def twin(name, **changes):
    "The preset `name`, shrunken: the same layout, in thousands of parameters."
    return preset(name, **TEXT | WIDTHS[name]).without_weights().but(**changes)


def save(folder, config, tensors, shards):
    "A checkpoint as the hub holds it: config.json, and weights whole or in shards."
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(config, indent=2))
    tensors = {k: t.contiguous().clone() for k, t in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / 'model.safetensors', {'format': 'pt'})
        return folder
    place = {k: f'model-{n % shards + 1:05}-of-{shards:05}' for n, k in enumerate(tensors)}
    for file in set(place.values()):
        part = {k: tensors[k] for k in tensors if place[k] == file}
        save_file(part, folder / f'{file}.safetensors', {'format': 'pt'})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = dict(
        metadata=dict(total_size=size),
        weight_map={k: f'{v}.safetensors' for k, v in place.items()},
    )
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
    return folder


def write_language(folder, cfg, tied=True, names='model.', shards=3, **changes):
    """A Qwen2.5 of the shape of the expert of `cfg`; `names`: before every tensor of the
    layers. Returns its tensors without that.
    """
    e = expert_config(cfg)
    config = dict(
        architectures=['Qwen2ForCausalLM'],
        model_type='qwen2',
        attention_dropout=0.0,
        hidden_act='silu',
        hidden_size=e.hidden_size,
        intermediate_size=e.intermediate_size,
        max_position_embeddings=131072,
        max_window_layers=28,
        num_attention_heads=e.num_attention_heads,
        num_hidden_layers=e.num_hidden_layers,
        num_key_value_heads=e.num_key_value_heads,
        rms_norm_eps=1e-6,
        rope_theta=cfg.text.rope_theta,
        sliding_window=131072,
        use_sliding_window=False,
        tie_word_embeddings=tied,
        torch_dtype='bfloat16',
        vocab_size=64,
    )
    config |= changes
    made = Qwen2ForCausalLM(Qwen2ForCausalLM.config_class(**config)).to(torch.bfloat16)
    for p in made.model.norm.parameters():
        torch.nn.init.uniform_(p)  # a norm of ones would prove nothing
    tensors = {k: v for k, v in made.state_dict().items() if not tied or 'lm_head' not in k}
    renamed = {
        k if k.startswith('lm_head') else names + k.removeprefix('model.'): v
        for k, v in tensors.items()
    }
    save(folder, config, renamed, shards)
    return {k.removeprefix('model.'): v for k, v in tensors.items()}


def write_vlm(folder, cfg, old=True, shards=3):
    """A Qwen2.5-VL of the sizes of `cfg` with the flat configuration of the hub; `old`: its
    names, too. Returns the tensors under the names of `Qwen2_5_VLModel`.
    """
    t, v = cfg.text, cfg.vision
    whole = qwen_config(cfg)
    whole.tie_word_embeddings = t.tied
    made = Qwen2_5_VLForConditionalGeneration(whole).to(torch.bfloat16)
    config = dict(
        architectures=['Qwen2_5_VLForConditionalGeneration'],
        model_type='qwen2_5_vl',
        hidden_act='silu',
        hidden_size=t.width,
        intermediate_size=t.mlp,
        max_position_embeddings=128000,
        num_attention_heads=t.heads,
        num_hidden_layers=t.layers,
        num_key_value_heads=t.kv_heads,
        rms_norm_eps=1e-6,
        rope_theta=t.rope_theta,
        rope_scaling=dict(type='mrope', mrope_section=list(t.mrope_section)),
        tie_word_embeddings=t.tied,
        torch_dtype='bfloat16',
        use_sliding_window=False,
        vocab_size=t.vocab,
        image_token_id=whole.image_token_id,
        video_token_id=whole.video_token_id,
        vision_start_token_id=whole.vision_start_token_id,
        vision_end_token_id=whole.vision_end_token_id,
        vision_config=dict(
            depth=v.depth,
            fullatt_block_indexes=list(v.full_attention),
            hidden_act='silu',
            hidden_size=v.width,
            in_chans=3,
            intermediate_size=v.mlp,
            model_type='qwen2_5_vl',
            num_heads=v.heads,
            out_hidden_size=t.width,
            patch_size=14,
            spatial_merge_size=2,
            spatial_patch_size=14,
            temporal_patch_size=2,
            tokens_per_second=2,
            window_size=112,
        ),
    )
    ours = {k.removeprefix('model.'): x for k, x in made.model.state_dict().items()}
    hub = lambda k: k if k.startswith('visual.') else k.replace('language_model.', 'model.')
    named = {hub(k) if old else f'model.{k}': x for k, x in ours.items()}
    head = {} if t.tied else {'lm_head.weight': made.lm_head.weight.detach()}
    save(folder, config, named | head, shards)
    return ours


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('names,shards', [('model.', 3), ('model.', 1), ('', 1), ('', 2)])
def test_every_tensor_of_the_language_model_is_in_the_expert(tmp_path, tied, names, shards):
    cfg = twin('paper', expert_id=str(tmp_path / 'language'))
    want = write_language(tmp_path / 'language', cfg, tied, names, shards)
    torch.manual_seed(1)
    m = HaloModel(cfg)
    layers = torch.nn.ModuleList([b.expert.layer for b in m.blocks]).state_dict()
    got = {f'layers.{k}': w for k, w in layers.items()} | {
        f'norm.{k}': w for k, w in m.heads.norm.state_dict().items()
    }
    lost = {k for k in want if k not in got}
    assert lost == {'embed_tokens.weight'} | (set() if tied else {'lm_head.weight'})
    assert got.keys() <= want.keys()  # none left random
    assert all(torch.equal(w, want[k]) for k, w in got.items())
    # and nothing else of the model has been touched
    torch.manual_seed(1)
    plain = HaloModel(cfg.without_weights()).state_dict()
    changed = {k for k, w in m.state_dict().items() if not torch.equal(w, plain[k])}
    assert changed and all('.expert.layer.' in k or 'heads.norm' in k for k in changed)


def test_fan_in_does_not_overwrite_what_was_read(tmp_path):
    "The start survives `init='fan_in'`, which the small presets use."
    cfg = twin('paper', init='fan_in', dtype='float32', expert_id=str(tmp_path / 'l'))
    want = write_language(tmp_path / 'l', cfg)
    got = HaloModel(cfg).blocks[2].expert.layer.mlp.up_proj.weight
    assert torch.equal(got, want['layers.2.mlp.up_proj.weight'].float())


@pytest.mark.parametrize(
    'wrong,said',
    [
        (dict(num_hidden_layers=2), 'layers 2'),
        (dict(hidden_size=96, num_attention_heads=3, num_key_value_heads=1), 'width 96'),
        (dict(num_key_value_heads=3), 'KV heads 3'),
        (dict(intermediate_size=64), 'MLP 64'),
    ],
)
def test_a_language_model_of_another_shape_is_refused(tmp_path, wrong, said):
    cfg = twin('paper', expert_id=str(tmp_path / 'language'))
    write_language(tmp_path / 'language', cfg, **wrong)
    with pytest.raises(ValueError, match='does not fit') as e:
        HaloModel(cfg)
    assert said in str(e.value)
    assert 'layers 3, width 192, heads 6, KV heads 2, MLP 160, head dim 32' in str(e.value)


def test_another_kind_of_model_is_refused(tmp_path):
    cfg = twin('base')
    write_vlm(tmp_path / 'vlm', cfg)
    write_language(tmp_path / 'language', cfg)
    with pytest.raises(ValueError, match='model qwen2_5_vl'):
        HaloModel(cfg.but(expert_id=str(tmp_path / 'vlm')))
    with pytest.raises(ValueError, match='it is model qwen2,.* wants model qwen2_5_vl'):
        HaloModel(cfg.but(vlm_id=str(tmp_path / 'language')))


def test_a_gap_in_the_files_is_no_random_start(tmp_path):
    cfg = twin('paper', expert_id=str(tmp_path / 'language'))
    write_language(tmp_path / 'language', cfg, shards=1)
    file = tmp_path / 'language/model.safetensors'
    kept = {k: w for k, w in load_file(file).items() if 'layers.1.mlp' not in k}
    save_file(kept, file, {'format': 'pt'})
    with pytest.raises(ValueError, match=r'3 tensors are missing .*layers\.1\.mlp'):
        HaloModel(cfg)


def test_missing_files_say_how_to_get_them(tmp_path):
    for name in (str(tmp_path / 'nowhere'), 'Qwen/Qwen2.5-1.5B'):
        with pytest.raises(OSError, match='expert weights .* set expert_id=DIR'):
            HaloModel(twin('paper', expert_id=name))


def test_another_rope_base_is_a_warning(tmp_path, caplog):
    cfg = twin('paper', expert_id=str(tmp_path / 'language'))
    write_language(tmp_path / 'language', cfg, rope_theta=10000.0)
    HaloModel(cfg)
    assert 'RoPE base 10000.0' in caplog.text


@pytest.mark.parametrize('old', [True, False])
@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('name', ['paper', 'base'])
def test_both_sizes_of_the_vlm_load_as_the_hub_lays_them_out(tmp_path, name, shards, old):
    cfg = twin(name, vlm_id=str(tmp_path / 'vlm'))
    want = write_vlm(tmp_path / 'vlm', cfg, old, shards)
    assert cfg.text.tied == (name == 'base')
    index = tmp_path / 'vlm/model.safetensors.index.json'
    if shards > 1:
        names = json.loads(index.read_text())['weight_map']
        assert ('lm_head.weight' in names) == (name == 'paper')
    got = build_qwen(cfg).state_dict()
    assert got.keys() == want.keys()
    assert all(torch.equal(w, want[k]) for k, w in got.items())
    m = HaloModel(cfg)
    words = want['language_model.embed_tokens.weight']
    assert torch.equal(m.embed.embed_tokens.weight, words)


def test_the_other_size_is_refused_with_both_named(tmp_path):
    qwen_config(preset('paper')).save_pretrained(tmp_path / 'seven')
    qwen_config(preset('base')).save_pretrained(tmp_path / 'three')
    for name, folder, texts in (
        ('base', 'seven', ('it is model qwen2_5_vl, layers 28, width 3584', 'width 2048')),
        ('paper', 'three', ('layers 36, width 2048, heads 16, KV heads 2', 'width 3584')),
    ):
        with pytest.raises(ValueError, match=f'vlm_id=.*{folder}') as e:
            build_qwen(preset(name, vlm_id=str(tmp_path / folder)))
        assert all(t in str(e.value) for t in texts)


def test_base_is_qwen_of_three_billion_and_a_narrow_expert():
    from halo.method.model import parameter_table

    p = parameter_table(preset('base'))
    vlm = sum(list(p['kept'].values())[:3]) + sum(p['extra'].values())
    assert vlm == 3_754_622_976  # all of Qwen2.5-VL-3B, which has no lm_head
    assert 0.38e9 < p['kept']['expert layers'] < 0.42e9
    salr = sum(v for k, v in p['kept'].items() if 'SALR' in k or 'state' in k)
    assert salr < 0.1 * p['kept']['expert layers']


def test_the_benchs_pi0_is_of_the_size_of_base():
    "`--size base`: within one per cent, and `base` as it is but for its history."
    from halo.studies.bench import count, peers

    ((make, cfg),) = peers('base', 50, 'bfloat16').values()
    with torch.device('meta'):
        theirs, ours = count(make()), count(HaloModel(cfg))
    assert abs(ours / theirs - 1) < 0.01
    assert cfg.text == preset('base').text and cfg.expert == preset('base').expert


def changes(**parts):
    "`--set` for nested values: {'policy': {'model': ...}} as KEY.KEY=VALUE."
    told = []

    def walk(path, x):
        if isinstance(x, dict):
            for k, v in x.items():
                walk([*path, k], v)
        else:
            told.extend(['--set', f'{".".join(path)}={json.dumps(x)}'])

    walk([], parts)
    return told


def shrink():
    "What makes the policy of a launch file of `base` the twin: `--set policy.model...`."
    out = {}
    for key, value in (TEXT | WIDTHS['base']).items():
        part, _, name = key.partition('__')
        if name:
            out.setdefault(part, {})[name] = value
        else:
            out[part] = value
    short = dict(history_frames=2, history_size=56, view_size=56, wrist_size=56)
    return out | dict(sampling=short, chunk=8)


@pytest.fixture(scope='module')
def own_robot(tmp_path_factory):
    "Demonstrations of a simulated robot, and a folder as Qwen2.5-VL-3B's, shrunken."
    from halo.sim.flash_place import main

    d = tmp_path_factory.mktemp('own_robot')
    assert not main(['--root', str(d / 'data'), '--episodes', '2'])
    write_vlm(d / 'qwen', twin('base'))
    return d


def own_robot_words(folder):
    "The token embedding of a checkpoint in shards."
    name = 'model.embed_tokens.weight'
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    return load_file(folder / index['weight_map'][name])[name]


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.parametrize('memory', [24, 48, 80])
def test_one_command_fine_tunes_base_on_one_card(own_robot, tmp_path, memory):
    """`halo train configs/launch/base_24gb.yaml` and its kin on a shrunken copy of the
    layout: it trains, is stopped, goes on, leaves a policy; `halo evaluate` plays it with
    Qwen's folder gone.
    """
    import shutil

    from halo.benchmarks.suite import main as evaluate
    from halo.train.scale import main as train

    qwen, out = shutil.copytree(own_robot / 'qwen', tmp_path / 'qwen'), tmp_path / 'run'
    said = changes(
        data=dict(root=str(own_robot / 'data'), store=str(own_robot / 'frames')),
        policy=dict(model=shrink(), vlm_id=str(qwen), n_action_steps=8),
        run=dict(steps=4, micro=1, accumulate=2, warmup=1, save_every=2, log_every=1),
        batch=2,
        out=str(out),
    )
    file = str(ROOT / f'configs/launch/base_{memory}gb.yaml')
    assert train([file, *said, '--dry-run', '--processes', '1']) == 0
    assert train([file, *said, '--device', 'cpu', '--until', '2']) == 0
    shutil.rmtree(qwen)
    assert train([file, *said, '--device', 'cpu']) == 0  # goes on
    rows = (out / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(x)['step'] for x in rows] == [1, 2, 3, 4]
    saved = json.loads((out / 'policy/config.json').read_text())
    assert saved['model']['text']['layers'] == 3 and saved['vlm_source'] == 'qwen'
    kept, words = load_file(out / 'policy/model.safetensors'), 'embed_tokens.weight'
    same = torch.equal(
        kept[f'model.embed.{words}'].bfloat16(), own_robot_words(own_robot / 'qwen')
    )
    assert same == (memory != 80)  # Qwen's, where they are frozen
    told = ['--policy', str(out / 'policy'), '--episodes', '1', '--videos', '0']
    assert evaluate(['--out', str(tmp_path / 'result'), *told]) == 0
