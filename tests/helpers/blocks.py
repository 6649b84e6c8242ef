"""The examples of pages, run as they stand."""

import doctest
import re


def run_blocks(text, name):
    """Runs the python and pycon blocks of `text`, one after the other, in one namespace.

    In what is printed `...` stands for anything, such as a temporary folder.
    """
    names = {}
    for kind, body in re.findall(r"(?ms)^```(python|pycon)\n(.*?)^```$", text):
        if kind == "python":
            exec(body, names)
            continue
        test = doctest.DocTestParser().get_doctest(body, names, name, name, 0)
        runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
        printed = []
        runner.run(test, out=printed.append, clear_globs=False)
        assert test.examples
        assert not runner.failures, "".join(printed)
        names = test.globs
    return names
