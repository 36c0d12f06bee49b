"""The web page: Streamlit on top of ``serve.client``. No torch, no Ray, no decoding: the service analyses all sound."""
