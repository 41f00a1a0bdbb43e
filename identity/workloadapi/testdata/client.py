"""The PyPI package spiffe as a client, as it is. Tells what it got, a JSON value a line."""
import json
import sys
import threading

from spiffe import WorkloadApiClient
from spiffe.svid.jwt_svid import JwtSvid


def tell(**values):
    print(json.dumps(values), flush=True)


def text(f):
    try:
        f()
    except Exception as e:  # whatever it is, the test reads it
        return str(e) or repr(e)
    return ""


with WorkloadApiClient() as client:
    try:
        svid = client.fetch_x509_svid(timeout=10)
    except Exception as e:
        tell(error=str(e))
        sys.exit(0)
    jwt = client.fetch_jwt_svid({"db"}, timeout=10)
    bundle = client.fetch_jwt_bundles(timeout=10).get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
    tell(
        id=str(svid.spiffe_id),
        roots=len(client.fetch_x509_bundles(timeout=10).get_bundle_for_trust_domain(svid.spiffe_id.trust_domain).x509_authorities),
        subject=str(JwtSvid.parse_and_validate(jwt.token, bundle, {"db"}).spiffe_id),
        valid=str(client.validate_jwt_svid(jwt.token, "db", timeout=10).spiffe_id),
        wrongAudience=text(lambda: client.validate_jwt_svid(jwt.token, "other", timeout=10)),
    )
    client.stream_x509_contexts(
        lambda context: tell(serial=str(context.default_svid.leaf.serial_number)),
        lambda error: tell(error=str(error)),
    )
    threading.Event().wait(float(sys.argv[1]))
