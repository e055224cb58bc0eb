# SPDX-License-Identifier: Apache-2.0
"""Chat templates and system prompts that adapters bring."""

import json

import pytest

from moepeft.core.http_access import ApiKeys
from moepeft.serve.http.chat_templates import ChatSettings, chat_settings
from tests.serve.fake_engine import END, text_of
from tests.serve.small_server import byte_tokenizer, fake, running

BASE = ChatSettings('base {{ messages[0].content }}', 'be kind')


def run(path, **data):
  """A work directory, as far as its config tells."""
  path.mkdir()
  (path / 'config.json').write_text(json.dumps({'data': data}))
  return str(path)


def test_a_run_brings_its_template_and_system(tmp_path):
  template = tmp_path / 'own.jinja'
  template.write_text('own')
  value = run(
    tmp_path / 'run', chat_template=str(template), system_prompt='be brief'
  )
  assert chat_settings(value, BASE) == ChatSettings('own', 'be brief')


def test_what_a_run_does_not_bring_is_the_bases(tmp_path):
  assert chat_settings(run(tmp_path / 'run'), BASE) == BASE
  assert chat_settings(str(tmp_path), BASE) == BASE


@pytest.mark.parametrize(
  'text',
  ['[', '7', '{"data": 7}', '{"data": {"system_prompt": 7}}', '[' * 10_000],
)
def test_a_damaged_config_does_not_lose_the_template_in_silence(tmp_path, text):
  (tmp_path / 'config.json').write_text(text)
  with pytest.raises(ValueError, match='config.json'):
    chat_settings(str(tmp_path), BASE)


def test_an_exported_adapter_brings_its_template(tmp_path):
  (tmp_path / 'chat_template.jinja').write_text('exported')
  assert chat_settings(str(tmp_path), BASE) == ChatSettings(
    'exported', 'be kind'
  )


def test_a_template_that_is_gone_is_told_and_nothing_is_loaded(tmp_path):
  value = run(tmp_path / 'run', chat_template=str(tmp_path / 'gone.jinja'))
  with pytest.raises(ValueError, match='gone.jinja'):
    chat_settings(value, BASE)
  service = fake(keys=ApiKeys((), (b'admin',)))
  with running(service) as client:
    client.key = 'admin'
    body = {'name': 'law', 'path': value}
    status, answer = client.post('/v1/adapters', body)
    assert status == 400 and 'gone.jinja' in answer['error']['message']
    assert client.engine.adapters() == []


def test_each_model_talks_by_its_own_template(tmp_path):
  (tmp_path / 'words').mkdir()
  words = byte_tokenizer(tmp_path / 'words')
  template = tmp_path / 'own.jinja'
  template.write_text('[{% for m in messages %}{{ m.content }};{% endfor %}]')
  path = run(tmp_path / 'run', chat_template=str(template), system_prompt='s')
  with running(fake(words, keys=ApiKeys((), (b'admin',)))) as client:
    client.key = 'admin'
    assert client.post('/v1/adapters', {'name': 'law', 'path': path})[0] == 200
    assert client.chat('a', model='law')[0] == 200
    assert text_of(client.engine.requests[-1].prompt_ids) == '[s;a;]'
    assert client.engine.requests[-1].adapter == 'law'
    assert client.chat('a')[0] == 200
    assert text_of(client.engine.requests[-1].prompt_ids) == 'u:a|a:'
    # A run of the base's template under the same name.
    path = run(tmp_path / 'other')
    assert client.post('/v1/adapters', {'name': 'law', 'path': path})[0] == 200
    client.chat('a', model='law')
    assert text_of(client.engine.requests[-1].prompt_ids) == 'u:a|a:'


def test_each_model_ends_as_its_own_template_does(tmp_path):
  (tmp_path / 'words').mkdir()
  words = byte_tokenizer(tmp_path / 'words')
  words.tokenizer.add_special_tokens({'pad_token': '<end>'})
  end = words.tokenizer.pad_token_id
  template = tmp_path / 'own.jinja'
  template.write_text(
    '{% for m in messages %}{{ m.role[0] }}:{{ m.content }}<end>{% endfor %}'
    '{% if add_generation_prompt %}a:{% endif %}'
  )
  path = run(tmp_path / 'run', chat_template=str(template))
  with running(fake(words, keys=ApiKeys((), (b'admin',)))) as client:
    client.key = 'admin'
    client.post('/v1/adapters', {'name': 'law', 'path': path})
    for model, ends in (('law', {END, end}), ('base', {END})):
      client.chat('a', model=model)
      assert set(client.engine.requests[-1].eos_token_ids) == ends
      client.complete('a', model=model)
      assert set(client.engine.requests[-1].eos_token_ids) == ends


def test_a_template_has_no_way_out_of_its_sandbox(tmp_path):
  (tmp_path / 'words').mkdir()
  words = byte_tokenizer(tmp_path / 'words')
  template = tmp_path / 'evil.jinja'
  template.write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
  path = run(tmp_path / 'run', chat_template=str(template))
  with running(fake(words, keys=ApiKeys((), (b'admin',)))) as client:
    client.key = 'admin'
    client.post('/v1/adapters', {'name': 'evil', 'path': path})
    status, answer = client.chat('a', model='evil')
    assert status == 400
    assert answer['error']['param'] == 'messages'
    assert 'subclass' not in answer['error']['message'].lower()


def test_an_adapter_that_cannot_be_read_leaves_what_was_there():
  with running(fake(keys=ApiKeys((), (b'admin',)))) as client:
    client.key = 'admin'
    good = {'name': 'law', 'path': 'runs/law'}
    assert client.post('/v1/adapters', good)[0] == 200
    bad = {'name': 'law', 'path': 'runs/broken'}
    status, answer = client.post('/v1/adapters', bad)
    assert status == 400 and 'runs/broken' in answer['error']['message']
    (value,) = client.get('/v1/adapters')[1]['data']
    assert value['source'] == 'runs/law'
    for name in ('base', 'a/b', ''):
      body = {'name': name, 'path': 'runs/law'}
      assert client.post('/v1/adapters', body)[0] == 400
    assert client.send('DELETE', '/v1/adapters/law')[0] == 200
    assert client.get('/v1/adapters')[1]['data'] == []
