"""Faults of several processes: file, line as it stands, line as broken, the test file and the part of the test's name."""

FAULTS = [
    # the same step and the same log
    ("ti_net.py", "last=k == len(micro_batches)):\n                        terms = finetune_step(", "last=False):\n                        terms = finetune_step(", "test_processes.py", "three_processes and ti_net"),
    ("handmim.py", "last=k == len(micro_batches)):\n                    terms = finetune_step(", "last=False):\n                    terms = finetune_step(", "test_processes.py", "three_processes and handmim"),
    ("peclr.py", "last=k == len(micro_batches)):\n                        terms = finetune_step(", "last=False):\n                        terms = finetune_step(", "test_processes.py", "three_processes and peclr"),
    ("sources/steps.py", "    return dict(zip(terms, total / world()))", "    return dict(zip(terms, total))", "test_processes.py", "line_of_the_log"),
    ("sources/progress.py", "            terms = mean_over_processes(terms)\n", "", "test_processes.py", "line_of_the_log"),
    # one of them ends
    ("common.py", "                signal.signal(number, signal.SIG_IGN)  ", "                pass  ", "test_processes.py", "silence and after"),
    ("common.py", "    if world() > 1 and any(words in text for words in GONE):", "    if not Stop.asked and any(words in text for words in GONE):", "test_processes.py", "silence and before"),
    ("common.py", '        if rank() == 0 or said.startswith("error"):', "        if rank() == 0:", "test_processes.py", "cannot_read"),
    ("common.py", 'sys.stderr.write("\\n" * (rank() > 0) + f', "sys.stderr.write(f", "test_processes.py", "cannot_read"),
    # and torchrun starts the job again
    ("sources/runs.py", "                    (folder / JOB).write_text(_job(), encoding=\"utf-8\")\n", "                    pass\n", "test_processes.py", "restart"),
    # a device without float64
    ("common.py", "dtype=finest(old.device))", "dtype=torch.float64)", "test_mps.py", "no_float64 and peclr and finetune"),
    ("sources/predictors.py", "to_device(model.eval().predict(to_device(seen, there)), here)", "model.eval().predict(to_device(seen, there))", "test_mps.py", "no_float64 and peclr and finetune"),
    ("sources/predictors.py", "return device if finest(device) == torch.float64 else torch.device(\"cpu\")", "return device", "test_mps.py", "judged"),
    ("hamuco.py", 'and cfg.device.startswith(WITHOUT_FLOAT64):', "and False:", "test_mps.py", "judged"),
]
