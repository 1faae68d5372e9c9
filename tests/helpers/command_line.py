"""`moma` in this process."""

from moma_jax.__main__ import main


def run(capsys, *words):
    """Exit code, standard output, standard error of `moma words...`."""
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as stopped:
        code = stopped.code or 0
    out, err = capsys.readouterr()
    return code, out, err
