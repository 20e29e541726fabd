"""Checkpoint files: what is read, and one error for each of the ways in which a file is none."""
from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from timm_spot.models.checkpoint_file import check_tensors, read_checkpoint, shorten


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f'touch {self.path}',)


def saved(content, **kwargs):
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def archive(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', compression) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return buffer.getvalue()


def members(content):
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def without(content, name):
    return archive({k: v for k, v in members(content).items() if not k.endswith(name)})


def changed(content, name, value):
    return archive({k: value if k.endswith(name) else v for k, v in members(content).items()})


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as file:
        file.addfile(tarfile.TarInfo('storages'))
    return buffer.getvalue()


def numpy_archive():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(3))
    return buffer.getvalue()


WEIGHTS = {'blocks.0.weight': torch.arange(1000.), 'count': torch.tensor(3)}
ZIP, LEGACY = saved(WEIGHTS), saved(WEIGHTS, _use_new_zipfile_serialization=False)
PICKLE = next(v for k, v in members(ZIP).items() if k.endswith('data.pkl'))

# What stands in files that are no checkpoints, and what their errors say.
DAMAGED = {
    'empty': (b'', r'empty \(0 bytes\)'),
    'text': (b'weights\nare elsewhere\n', "a text file that begins with 'weights'"),
    'page of a failed download': (b'<!DOCTYPE html><html>Not found</html>', "text file that begins with '<!DOCTYPE"),
    'pointer': (b'version https://git-lfs.github.com/spec/v1\noid sha256:1', 'pointer of Git LFS.*git lfs pull'),
    'noise': (bytes(range(1, 256)) * 3, 'cut off, damaged, or of another kind'),
    'zeros': (bytes(2000), 'cut off, damaged, or of another kind'),
    'half an archive': (ZIP[:len(ZIP) // 2], 'zip archive that is cut off'),
    'archive without its end': (ZIP[:-40], 'zip archive that is cut off'),
    'half of the old form': (LEGACY[:len(LEGACY) // 2], 'cut off, damaged, or of another kind'),
    'start of the old form': (LEGACY[:30], 'cut off, damaged, or of another kind'),
    'archive of a text': (archive({'a.txt': b'x'}), "zip archive without a checkpoint.*data.pkl"),
    'archive of nothing': (archive({}), 'zip archive without a checkpoint'),
    'archive of arrays': (numpy_archive(), 'NumPy archive without a checkpoint'),
    'archive without data': (without(ZIP, 'data/0'), 'damaged archive'),
    'archive with too little data': (changed(ZIP, 'data/0', b'123'), 'damaged archive'),
    'archive of another version': (changed(ZIP, 'version', b'abc'), 'damaged archive'),
    'archive with an empty pickle': (changed(ZIP, 'data.pkl', b''), 'cannot be read as a checkpoint'),
    'archive with half a pickle': (changed(ZIP, 'data.pkl', PICKLE[:len(PICKLE) // 2]), 'x.pth '),
    'compressed archive': (archive(members(ZIP), zipfile.ZIP_DEFLATED), 'packed again, compressed'),
    'archive of a script': (archive({'m/constants.pkl': b'', 'm/data.pkl': b''}), 'TorchScript archive, which holds'),
    'tar': (tar(), 'tar archive: unpack it first'),
    'gzip': (b'\x1f\x8b\x08' + bytes(50), 'gzip archive: unpack it first'),
    'safetensors under another name': (save(WEIGHTS), 'is a safetensors file: give it the suffix .safetensors'),
    'archive of a later protocol': (saved(WEIGHTS, pickle_protocol=4), r'pickled by protocol 4.*pickle_protocol=2'),
    'later protocol': (pickle.dumps({'a': [1.]}, protocol=4), 'pickled by protocol 4'),
    'plain pickle': (pickle.dumps({'a': [1.]}, protocol=2), 'cannot be read as a checkpoint'),
    'pickle of a missing memo': (b'\x80\x02h\x05.', 'cannot be read as a checkpoint'),
    'pickle of nothing': (b'\x80\x02.', 'cannot be read as a checkpoint'),
    'pickle of a negative length': (b'\x80\x02\x8b\xff\xff\xff\xff.', 'cannot be read as a checkpoint'),
    'list': (saved([1, 2]), 'holds a list, not a state dict'),
    'tensor': (saved(torch.ones(1)), 'holds a Tensor, not a state dict'),
    'nothing': (saved(None), 'holds a NoneType, not a state dict'),
    'dict of nothing': (saved({}), 'holds no weights at all'),
    'entry of nothing': (saved({'model': {}, 'epoch': 3}), 'holds no weights at all'),
    'entry that is text': (saved({'state_dict': 'elsewhere'}), "holds a str as 'state_dict'"),
    'entry in an entry': (saved({'model': {'model': WEIGHTS}}), r'other things than tensors .*: model \(dict\)'),
    'settings among the weights': (saved(dict(WEIGHTS, lr=0.1)), r'other things than tensors .*: lr \(float\)'),
    'numbers for names': (saved({0: torch.ones(1)}), r'keys that are no names: 0 \(int\)'),
    'names twice': (saved({'a': torch.ones(1), 'module.a': torch.ones(1)}), "twice, with and without 'module.'"),
    'NaN': (saved({'a': torch.ones(2), 'b': torch.tensor([1., float('nan')])}), 'NaN or infinity in b'),
    'infinity': (saved({'model': {'a': torch.tensor(-torch.inf)}}), 'NaN or infinity in a'),
    'NaN in half precision': (saved({'a': torch.tensor([torch.nan]).bfloat16()}), 'NaN or infinity in a'),
    'eight bits': (saved({'head.weight': torch.ones(3, dtype=torch.int8)}), 'weights as int8.*: head.weight'),
    'whole numbers': (saved({'head.bias': torch.ones(3, dtype=torch.int64)}), 'weights as int64.*: head.bias'),
    'eight-bit floats': (saved({'a.weight': torch.ones(3).to(torch.float8_e4m3fn)}), 'weights as float8_e4m3fn'),
    'complex numbers': (saved({'a': torch.ones(3, dtype=torch.complex64)}), 'weights as complex64'),
    'sparse tensors': (saved({'a': torch.eye(3).to_sparse()}), 'sparse or quantised tensors'),
    'tensors without data': (saved({'a': torch.ones(3, device='meta')}), 'without the data for their shape: a'),
    'a number said to be a billion': (saved({'a': torch.ones(1).expand(10 ** 12)}), 'without the data for their shape'),
}


@pytest.mark.parametrize('kind', DAMAGED)
def test_what_is_no_checkpoint_is_named_with_what_is_wrong(tmp_path, kind):
    content, says = DAMAGED[kind]
    (tmp_path / 'x.pth').write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_checkpoint(tmp_path / 'x.pth')
    message = str(caught.value)
    assert message.startswith(str(tmp_path / 'x.pth')) and '\n' not in message
    assert 'weights_only' not in message  # torch's advice to do without safety


@pytest.mark.parametrize('at', range(0, len(PICKLE), 5))
def test_a_changed_byte_gives_weights_or_one_error_and_never_another_one(tmp_path, at):
    flipped = PICKLE[:at] + bytes([PICKLE[at] ^ 0x15]) + PICKLE[at + 1:]
    for content in (changed(ZIP, 'data.pkl', flipped), LEGACY[:at] + bytes([LEGACY[at] ^ 0x15]) + LEGACY[at + 1:]):
        (tmp_path / 'x.pth').write_bytes(content)
        try:
            assert read_checkpoint(tmp_path / 'x.pth').tensors
        except ValueError as e:
            assert str(e).startswith(str(tmp_path)) and 'weights_only' not in str(e)


@pytest.mark.parametrize('form', ['zip', 'legacy', 0, 1, 2, 4])
def test_foreign_code_is_named_and_never_run(tmp_path, form):
    bomb = Bomb(tmp_path / 'exploded')
    content = pickle.dumps(bomb, protocol=form) if isinstance(form, int) else saved(
        {'model': WEIGHTS, 'x': bomb}, _use_new_zipfile_serialization=form == 'zip')
    (tmp_path / 'x.pth').write_bytes(content)
    with pytest.raises(ValueError, match=r'objects that are no weights: posix\.system\. They could run any code'):
        read_checkpoint(tmp_path / 'x.pth')
    assert [p.name for p in tmp_path.iterdir()] == ['x.pth']


SAFE = save({'a': torch.ones(10)})
DAMAGED_SAFETENSORS = {
    'empty': (b'', 'empty'),
    'too short': (SAFE[:-4], 'not fully covered'),
    'half a header': (SAFE[:20], 'header'),
    'text': (b'<html>Sign in first</html>', "text file that begins with '<html>"),
    'pointer': (b'version https://git-lfs.github.com/spec/v1\noid sha256:1', 'pointer of Git LFS'),
    'header longer than the file': (struct.pack('<Q', 1 << 60) + SAFE[8:], 'header too large'),
    'shape that its bytes do not fill': (SAFE.replace(b'[10]', b'[99]'), 'shape'),
    'negative shape': (SAFE.replace(b'[10]', b'[-1]'), 'no intact safetensors file'),
    'unknown type': (SAFE.replace(b'F32', b'F99'), 'F99'),
    'bytes behind the end': (SAFE + b'abc', 'not fully covered'),
    'torch.save under another name': (ZIP, 'is a file of torch.save.*suffix .pth'),
    'no tensors': (save({}), 'holds no weights at all'),
    'infinity': (save({'a': torch.tensor([torch.inf])}), 'NaN or infinity in a'),
    'eight bits': (save({'a': torch.ones(3, dtype=torch.int8)}), 'weights as int8'),
}


@pytest.mark.parametrize('kind', DAMAGED_SAFETENSORS)
def test_damaged_safetensors_are_named_with_what_is_wrong(tmp_path, kind):
    content, says = DAMAGED_SAFETENSORS[kind]
    (tmp_path / 'x.safetensors').write_bytes(content)
    with pytest.raises(ValueError, match=says) as caught:
        read_checkpoint(tmp_path / 'x.safetensors')
    assert str(caught.value).startswith(str(tmp_path / 'x.safetensors'))


def test_what_is_no_file_is_named_and_not_waited_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'no\.pth does not exist'):
        read_checkpoint(tmp_path / 'no.pth')
    with pytest.raises(IsADirectoryError, match=r"is a folder, no checkpoint file: .*'local-dir:"):
        read_checkpoint(tmp_path)
    os.mkfifo(tmp_path / 'pipe.pth')
    with pytest.raises(ValueError, match=r'pipe\.pth is no regular file'):
        read_checkpoint(tmp_path / 'pipe.pth')
    (tmp_path / 'loop.pth').symlink_to(tmp_path / 'loop.pth')
    with pytest.raises(FileNotFoundError, match=r'loop\.pth does not exist'):
        read_checkpoint(tmp_path / 'loop.pth')


@pytest.mark.parametrize('form', ['zip', 'legacy', 'safetensors', 'ordered', 'parallel'])
def test_every_form_of_a_checkpoint_is_read(tmp_path, form):
    file = tmp_path / ('x.safetensors' if form == 'safetensors' else 'x.pth')
    if form == 'safetensors':
        save_file(WEIGHTS, file)
    elif form == 'ordered':
        torch.save(collections.OrderedDict(WEIGHTS), file)
    elif form == 'parallel':
        torch.save({f'module.{k}': torch.nn.Parameter(v) if 'weight' in k else v for k, v in WEIGHTS.items()}, file)
    else:
        torch.save(WEIGHTS, file, _use_new_zipfile_serialization=form != 'legacy')
    read = read_checkpoint(file)
    assert read.entry == '' and read.args == {} and read.ignored == ()
    assert sorted(read.tensors) == sorted(WEIGHTS)
    assert all(torch.equal(read.tensors[k], v) for k, v in WEIGHTS.items())


def test_averaged_weights_come_before_the_last_ones_as_in_timm(tmp_path):
    last, averaged = {'a': torch.zeros(1)}, {'a': torch.ones(1)}
    args = argparse.Namespace(model='vit_tiny_patch16_224', lr=0.1)
    torch.save(dict(epoch=3, state_dict=last, state_dict_ema=averaged, model_ema=None, args=args), tmp_path / 'x.pth')
    read = read_checkpoint(tmp_path / 'x.pth')
    assert read.entry == 'state_dict_ema' and read.tensors['a'].item() == 1
    assert read.args['model'] == 'vit_tiny_patch16_224'
    assert read.ignored == ('epoch', 'state_dict', 'model_ema')


def test_a_name_that_is_no_utf8_is_not_taken_for_damage(tmp_path):
    path = tmp_path / 'caf\udce9.safetensors'
    path.write_bytes(b'whatever')
    with pytest.raises(ValueError, match=r'lies under a name that is no UTF-8, .*: give another name'):
        read_checkpoint(path)


def test_names_in_messages_are_short_and_on_one_line():
    assert shorten(['a', 'b']) == 'a, b'
    assert shorten(list('abcdef')) == 'a, b, c, d, ... (6 in all)'
    assert shorten(['\x1b[31m\n', 'x' * 200]) == '\\x1b[31m\\n, ' + 'x' * 97 + '...'
    with pytest.raises(ValueError, match=r'weights holds other things than tensors .*: \\x1b\[31m \(str\)'):
        check_tensors({'\x1b[31m': 'red'}, 'weights')
