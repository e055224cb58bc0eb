# SPDX-License-Identifier: Apache-2.0
"""Trained tokens of a conversation follow the prompt of generation."""

import itertools

import pytest

from moepeft import config as config_lib
from moepeft.data.batching.decoder_only import CausalCollator
from moepeft.data.chat import dataset as chat_dataset
from moepeft.data.chat.formats import Conversation, Turn
from moepeft.data.example import BadRow
from moepeft.data.preference import tokenize as preference_tokenize
from moepeft.data.tokenizers.tokenizer import HuggingFaceTokenizer

from ... import chat_cases

KINDS = ('bytes', 'lines', 'spaces')
TEMPLATES = ('CHATML', 'REWRITING', 'MARKED', 'FORGETTING', 'PLAIN')
ANSWERS = ('the mat', '  x = 1', '\n\nagain', ':) it said', ' on')


@pytest.fixture(scope='module')
def tokenizers():
  return {kind: chat_cases.learnt(kind) for kind in KINDS}


def shown(sample, tokenizer):
  """The text with what is trained in brackets."""
  parts = []
  for own, group in itertools.groupby(
    zip(sample.ids.tolist(), sample.loss_mask, strict=True), lambda x: x[1]
  ):
    text = tokenizer.decode([i for i, _ in group])
    parts.append(f'[{text}]' if own else text)
  return ''.join(parts)


def talk_of(*said):
  roles = itertools.cycle(('user', 'assistant'))
  return Conversation(
    tuple(Turn(role, text) for role, text in zip(roles, said, strict=False))
  )


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', TEMPLATES)
@pytest.mark.parametrize('answer', ANSWERS)
def test_an_answer_follows_the_ids_that_are_generated_from(
  tokenizers, kind, name, answer
):
  tokenizer, template = tokenizers[kind], getattr(chat_cases, name)
  used = chat_dataset.ChatTemplate(tokenizer, template)
  talk = talk_of('a dog', answer)
  actual, whole = used.encode(talk), used.render(talk).text
  joint = tokenizer(whole, add_special_tokens=False)['input_ids']
  assert tokenizer.decode(actual.ids.tolist()) == tokenizer.decode(joint)
  prompt = tokenizer.apply_chat_template(
    [{'role': 'user', 'content': 'a dog'}],
    chat_template=template,
    tokenize=False,
    add_generation_prompt=True,
  )
  ids = tokenizer(prompt, add_special_tokens=False)['input_ids']
  assert actual.ids[: len(ids)].tolist() == ids
  # The answer is trained from its first token on, and no token before it.
  assert not actual.loss_mask[: len(ids)].any() and actual.loss_mask[len(ids)]
  assert answer.strip() in tokenizer.decode(
    actual.ids[actual.loss_mask].tolist()
  )


@pytest.mark.parametrize('kind', KINDS)
def test_ids_are_those_of_the_whole_text_where_no_token_straddles(
  tokenizers, kind
):
  tokenizer = tokenizers[kind]
  talk = talk_of('a dog', 'the mat', 'again', 'and  x', 'it', 'on')
  used = chat_dataset.ChatTemplate(tokenizer)
  whole = used.render(talk).text
  ids = tokenizer(whole, add_special_tokens=False)['input_ids']
  assert used.encode(talk).ids.tolist() == ids


def test_a_token_across_an_answer_s_beginning_is_two(tokenizers):
  tokenizer = tokenizers['lines']
  used = chat_dataset.ChatTemplate(tokenizer, chat_cases.PLAIN)
  talk = talk_of('the cat', 'on the mat', 'it', ':) x')
  whole = used.render(talk).text
  # ':on the mat' begins with ':' and so do others: the tokenizer joins them.
  joint = tokenizer(whole, add_special_tokens=False)['input_ids']
  pieces = {tokenizer.decode([i]) for i in joint}
  assert any(':' in p and not p.endswith(':') for p in pieces)
  actual = used.encode(talk)
  assert tokenizer.decode(actual.ids.tolist()) == whole
  assert shown(actual, tokenizer) == (
    'user:the cat</s>assistant:[on the mat</s>]user:it</s>assistant:[:) x</s>]'
  )


@pytest.mark.parametrize('second', ['yes', 'no'])
def test_an_answer_ends_before_the_next_turn(second):
  tokenizer = chat_cases.tokenizer(chat_cases.FORGETTING)
  said = '<think>\n\n</think>\n\n{}'
  talk = talk_of('one?', said.format('yes'), 'SECRET', said.format(second))
  actual = chat_dataset.ChatTemplate(tokenizer).encode(talk)
  assert shown(actual, tokenizer) == (
    '<|im_start|>user\none?<|im_end|>\n'
    '<|im_start|>assistant\n[yes<|im_end|>]\n'
    '<|im_start|>user\nSECRET<|im_end|>\n'
    f'<|im_start|>assistant\n[<think>\n\n</think>\n\n{second}<|im_end|>]\n'
  )


def test_an_answer_that_a_template_leaves_out_is_refused():
  template = chat_cases.REWRITING.replace(
    "{{ m['content'] }}<|im_end|>\n",
    "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}<|im_end|>\n"
    '{% endif %}',
  )
  tokenizer = chat_cases.tokenizer(template)
  # 'yes' stands nowhere before the next turn but where the user says it.
  with pytest.raises(BadRow, match='rewrites turn 1'):
    chat_dataset.ChatTemplate(tokenizer).encode(
      talk_of('one?', 'yes', 'yes', 'yes')
    )


def test_marks_are_seen_with_blanks_trimmed_as_the_template_says():
  template = chat_cases.MARKED.replace(
    '{% generation %}', '  \n{%- generation -%}\n '
  ).replace('{% endgeneration %}', '\n {%- endgeneration %}')
  tokenizer = chat_cases.tokenizer()
  talk = talk_of('one?', 'yes', 'two?', 'no')
  actual = chat_dataset.ChatTemplate(tokenizer, template).encode(talk)
  marked = tokenizer.apply_chat_template(
    [{'role': turn.role, 'content': turn.content} for turn in talk.turns],
    chat_template=template,
    return_dict=True,
    return_assistant_tokens_mask=True,
  )
  assert actual.ids.tolist() == marked['input_ids']
  assert actual.loss_mask.tolist() == [
    bool(i) for i in marked['assistant_masks']
  ]


def test_weights_say_which_answers_are_trained():
  tokenizer = chat_cases.tokenizer()
  turns = list(talk_of('one?', 'yes', 'two?', 'no').turns)
  turns[1] = Turn('assistant', 'yes', trained=False)
  for template in (chat_cases.CHATML, chat_cases.MARKED):
    actual = chat_dataset.ChatTemplate(tokenizer, template).encode(
      Conversation((*turns,))
    )
    text = shown(actual, tokenizer)
    assert 'assistant\nyes<|im_end|>' in text and '[no<|im_end|>]' in text
    assert text.count('[') == 1
  with pytest.raises(BadRow, match="config.data.train_on='all' trains every"):
    chat_dataset.ChatTemplate(tokenizer, train_on='all').encode(
      Conversation((*turns,))
    )


def test_thoughts_are_written_by_templates_that_know_them():
  talk = Conversation(
    (Turn('user', 'one?'), Turn('assistant', 'yes', thought='hm'))
  )
  tokenizer = chat_cases.tokenizer(chat_cases.FORGETTING)
  text = shown(chat_dataset.ChatTemplate(tokenizer).encode(talk), tokenizer)
  assert text.endswith('[<think>\nhm\n</think>\n\nyes<|im_end|>]\n')
  with pytest.raises(BadRow, match="'reasoning_content', which the chat"):
    chat_dataset.ChatTemplate(chat_cases.tokenizer()).encode(talk)


def test_compared_answers_follow_the_ids_that_are_generated_from(
  tokenizers, tmp_path
):
  tokenizer = tokenizers['bytes']
  tokenizer.save_pretrained(tmp_path)
  words = HuggingFaceTokenizer(str(tmp_path))
  data = config_lib.default().data
  encode = preference_tokenize.row_encoder(
    data, CausalCollator(words, 97), None
  )
  # Tokens lie across the beginnings of an answer in the prompt and of one that
  # is compared: only the latter's is two.
  prompt = talk_of('a dog', '  x = 1', 'the cat')
  answers = [Turn('assistant', text) for text in ('  x = 1', 'the mat')]
  parts = encode(prompt, answers)
  assert parts.prompt.tolist() == chat_dataset.ChatTemplate(
    tokenizer
  ).encode_prompt(prompt)
  shown = [words.show(ids.tolist()) for ids, _ in parts.answers]
  assert shown == ['  x = 1<|im_end|>\n', 'the mat<|im_end|>\n']
  assert all(trained[:-1].all() for _, trained in parts.answers)


def test_generation_begins_as_training_did(tokenizers):
  tokenizer = tokenizers['bytes']
  ids = chat_dataset.ChatTemplate(tokenizer).encode_prompt(talk_of('a dog'))
  actual = chat_dataset.ChatTemplate(tokenizer).encode(
    talk_of('a dog', '  x = 1')
  )
  assert actual.ids[: len(ids)].tolist() == ids
  assert int(actual.loss_mask.argmax()) == len(ids)
