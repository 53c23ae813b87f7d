"""Writes the bundled molecules, one a line, without those of `bundled:molecule-preferences/test`.

python configs/studies/dpo/molecules.py FILE
"""

import sys
from pathlib import Path

from lit_interns1.data.bundled_preferences import bundled_preferences_size
from lit_interns1.data.molecule_questions import shuffled_molecules

if __name__ == "__main__":
    held_out = bundled_preferences_size("bundled:molecule-preferences/test")
    Path(sys.argv[1]).write_text("\n".join(shuffled_molecules()[:-held_out]) + "\n", encoding="ascii")
