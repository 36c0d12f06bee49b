"""The web page: ``streamlit run app.py``, or ``make app``.

It uses the service at ``SER_API_URL`` with the API key ``SER_API_KEY``. Without an address it starts a service itself.
"""

from __future__ import annotations

import streamlit as st

from app_pages import frame


def main() -> None:
    """Draw the page that the URL selects."""
    st.set_page_config(page_title="Speech emotion", page_icon=frame.ICON, layout="wide")
    frame.run()


if __name__ == "__main__":
    main()
