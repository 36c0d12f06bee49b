"""Bytes to samples: reads every audio format, refuses bad recordings with a reason, and chooses the windows to cut out.

Not here: features of the samples (``features``), and where files come from (``storage``).

Start with: ``load.load``, ``load.probe``, ``source.AudioSource``, ``windows.Window``, ``speech.speech_share``,
``live.Tape``.
"""
