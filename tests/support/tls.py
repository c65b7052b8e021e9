"""Certificates and keys of nobody: made with openssl for these tests, valid for a hundred years."""

from __future__ import annotations

from pathlib import Path

CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBnDCCAUGgAwIBAgIUFPIyT08a5V6uOrxTIDiVz/XmwEYwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNjA2NDkzOVoYDzIxMjYxMTAy
MDY0OTM5WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQqjyaleBS21VubTVR+RATN1XOtJ9NByZgCochl7zf0bMOqGXE5irca
pagQdsWJhzPE+gTAKWVZrrPCks0ep3jNo28wbTAdBgNVHQ4EFgQUQqeknddvYVQM
zt8mZMOa5M/HSCMwHwYDVR0jBBgwFoAUQqeknddvYVQMzt8mZMOa5M/HSCMwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSQAwRgIhAPBphhAYb7CWAgzOGInpssxI78Hug2tj1EfLHzMU73iDAiEA
i/tsevcAnwKGKGKzuQOXZQsGay9YYQPOpPdywe0p6G0=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg0XR2HHQspruPWdCb
pstDFZ1H3IbBQ6OowiNEshO8REOhRANCAAQqjyaleBS21VubTVR+RATN1XOtJ9NB
yZgCochl7zf0bMOqGXE5ircapagQdsWJhzPE+gTAKWVZrrPCks0ep3jN
-----END PRIVATE KEY-----
"""
OTHER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgURAadtaPYq2jrNb0
Ypc08CpJqOWjvO4qYRubfgOkCyyhRANCAAQ9nflBbT8trVcsOc+XEFqFSRLqrsjt
a6js7DJCxbmmvuZeL7oeAWTb7km/StScT65s7Msi0biU/AmbHNAPNd0X
-----END PRIVATE KEY-----
"""
ENCRYPTED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAiNfkMXkrEdkAICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEHXXx/yCaIoLrJRZ0tDvcmEEgZCr
BxKaKYWZfvoBCQA57U382H6LeF3rZGpKFiRNe6MVo62RUnDEBkMieIlp5ZTDk+Kd
Z4SfQmD+TAfiKbV78ALroC3jAhzKLTxkGDGNkNRHBO77EVCW7n/ETMT1mpzDooAp
MrX4OJIH8U2bClCtxfPM2yDB+evPeckEhfy1nEg5XuiULblTOppP2hyM+9iCL+c=
-----END ENCRYPTED PRIVATE KEY-----
"""


def write_tls_files(folder: Path) -> tuple[Path, Path]:
    """A certificate of ``localhost`` and its key."""
    certificate, key = folder / "cert.pem", folder / "key.pem"
    certificate.write_text(CERTIFICATE)
    key.write_text(KEY)
    return certificate, key
