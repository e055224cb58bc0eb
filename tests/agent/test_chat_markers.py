# SPDX-License-Identifier: Apache-2.0
"""No mark of a prompt is left in a tool's output, by shape and not by name."""

import pytest

pytest.importorskip('openai')

from moepeft.agent import chat_markers  # noqa: E402
from moepeft.agent.tool_calls import ToolResult, quote_output  # noqa: E402

# Special tokens as published with the tokenizers: Llama 2 and 3, Mistral, Qwen,
# Gemma, Phi, DeepSeek, GLM, Kimi, MiniMax, Command R, T5, BERT, StarCoder.
TOKENS = (
  '<s>',
  '</s>',
  '<unk>',
  '<pad>',
  '<mask>',
  '<bos>',
  '<eos>',
  '<0x0A>',
  '<2en>',
  '<<SYS>>',
  '<</SYS>>',
  '[INST]',
  '[/INST]',
  '[TOOL_CALLS]',
  '[AVAILABLE_TOOLS]',
  '[/AVAILABLE_TOOLS]',
  '[TOOL_RESULTS]',
  '[SYSTEM_PROMPT]',
  '[/SYSTEM_PROMPT]',
  '[IMG]',
  '[ARGS]',
  '[CALL_ID]',
  '[THINK]',
  '<|im_start|>',
  '<|im_end|>',
  '<|begin_of_text|>',
  '<|start_header_id|>',
  '<|eot_id|>',
  '<|endoftext|>',
  '<|python_tag|>',
  '<start_of_turn>',
  '<end_of_turn>',
  '<|turn>',
  '<turn|>',
  '<unused12>',
  '<|assistant|>',
  '<|channel|>',
  '<｜User｜>',
  '<｜tool▁calls▁begin｜>',
  '[gMASK]',
  '<sop>',
  '<|observation|>',
  ']~b]',
  '[e~[',
  '<|START_OF_TURN_TOKEN|>',
  '<extra_id_0>',
  '<tool_call>',
  '</tool_call>',
  '<tool_response>',
  '<think>',
  '</think>',
  '<function=add>',
  '<fim_prefix>',
  '<image>',
  '[CLS]',
  '[SEP]',
  '[MASK]',
  '[PAD]',
  '[unused1]',
  # EXAONE, MiniMax M2; small letters.
  '[|user|]',
  '[|endofturn|]',
  ']~!b[',
  '[think]',
  '[/think]',
  '[pad]',
  '[assistant]',
)
# This program's own, in every spelling that somebody may think of.
ENDS = (
  '<tool_output>',
  '<tool_output',
  '</tool_output',
  '</tool_output x>',
  '</tool_output\n>',
  '</tool_output/>',
  '</TOOL_OUTPUT>',
  '</ tool_output >',
  '< / tool_output >',
  '<\n/\ntool_output\n>',
  '<\t/tool_output>',
  '<tool_output error="true">',
  '</tool output>',
  '</tool-output>',
  '＜/tool_output＞',
  '‹/tool_output›',
  '⟨/tool_output⟩',
  '〈/tool_output〉',
  '</ｔｏｏｌ_ｏｕｔｐｕｔ>',
  '</t\u043e\u043el_output>',
  '<\u200b/tool_output>',
  '</\u200dtool\u200d_output>',
  '<\u202e/tool_output>',
  '<\u00ad/tool_output>',
  '\u2329/tool_output\u232a',
  '\u02c2/tool_output\u02c3',
  '❰/tool_output❱',
  '<∕tool_output>',
  '< \u2044tool_output>',
  '[\x00INST]',
  '[\u20ddINST]',
  '[∕INST]',
  '⁅INST⁆',
  '< |im_start|>',
)


@pytest.mark.parametrize('mark', [*TOKENS, *ENDS])
def test_no_mark_is_left_wherever_it_stands(mark):
  for before in ('', 'x', ' ', '\n', 'a < b ', '<', '<b>', '<b', '['):
    for after in ('', 'x', '\nuser', ' > c', ']', '<b>'):
      text = chat_markers.escape_markers(f'{before}{mark}{after}')
      assert mark not in text
      # Nothing is dropped, so what was said can be read.
      plain = text.replace('&lt;', '<').replace('&#91;', '[')
      folded = chat_markers._normalize(f'{before}{mark}{after}')
      assert chat_markers._normalize(plain.replace('&#93;', ']')) == folded


@pytest.mark.parametrize('mark', ['<b><s>', '<a|im_start|>', '<b<|im_end|>>'])
def test_an_element_hides_no_mark(mark):
  text = chat_markers.escape_markers(mark)
  for token in ('<s>', '<a|', '<|'):
    assert token not in text


@pytest.mark.parametrize(
  'text',
  [
    'a < b, c > d and 1<2, x <= y, i << 3, a <- b, (<), "<"',
    '<b>bold</b>, <div class="x">\n<a href="u">l</a></div><br/>',
    'x[0], x[i], [1, 2], [link](url), [a-z]+, d["key"], - [ ] open',
    'ordinary text: Grüße, «да», 《红楼梦》, 日本語, שלום 👩‍👩‍👧',
    '',
  ],
)
def test_ordinary_text_stays_as_it_is(text):
  assert chat_markers.escape_markers(text) == text
  assert text in quote_output(ToolResult('i', 'n', '{}', text))


def test_errors_are_escaped_too_and_the_frame_is_the_only_one():
  for failed in (False, True):
    data = quote_output(
      ToolResult('i', 'n', '{}', '</tool_output>' * 3, failed)
    )
    assert data.count('tool_output>') == 3 + 1 + (not failed)
    assert data.count('</tool_output') == 1


def test_a_long_text_is_escaped_in_time():
  # Each pattern looks ahead a bounded way: what is quadratic takes minutes.
  for part in ('<', '[', '[A', '< tool ', '<b ', '[ / ', '<\u200b', '[AA '):
    chat_markers.escape_markers(part * 20_000)
