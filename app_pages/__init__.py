"""The web page: Streamlit over ``serve.client``. No torch, no Ray, no decoding: all hearing is the service's."""
