"""The npm packages that the pocket data is made of: pinned versions, integrity, licences, credits.

Nothing of them is part of the repository; `notice_text` gives the credits that go with pictures made from them.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """One pinned npm package; `sha512` is the base64 part of npm's integrity value, over the bytes of the tarball."""

    name: str
    version: str
    sha512: str
    licence: str
    credit: str

    @property
    def tarball_name(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PINNED_PACKAGES = (
    Package(
        "emojibase-data",
        "17.0.0",
        "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
        "MIT",
        "Emojibase by Miles Johnson; names and keywords from Unicode CLDR (Unicode License v3)",
    ),
    Package(
        "@iconify-json/twemoji",
        "1.2.5",
        "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        "CC-BY-4.0",
        "Twemoji, Twitter Inc. and contributors (github.com/jdecked/twemoji)",
    ),
    Package(
        "@iconify-json/fluent-emoji-flat",
        "1.2.6",
        "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        "MIT",
        "Fluent Emoji, Microsoft Corporation (github.com/microsoft/fluentui-emoji)",
    ),
    Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "MIT",
        "Fluent Emoji 3D, Microsoft Corporation, packaged by LobeHub (its flags are not used: their origin is unclear)",
    ),
    Package(
        "@iconify-json/emojione",
        "1.2.3",
        "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        "CC-BY-4.0",
        "EmojiOne 2 / EmojiTwo (github.com/EmojiTwo/emojitwo)",
    ),
    Package(
        "@iconify-json/openmoji",
        "1.2.29",
        "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        "CC-BY-SA-4.0",
        "OpenMoji, HfG Schwaebisch Gmuend (openmoji.org)",
    ),
    Package(
        "@iconify-json/emojione-v1",
        "1.2.3",
        "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
        "CC-BY-SA-4.0",
        "EmojiOne 1 (github.com/joypixels/emojione-legacy)",
    ),
    Package(
        "@iconify-json/fxemoji",
        "1.2.2",
        "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        "Apache-2.0",
        "FxEmojis, Mozilla Foundation (github.com/mozilla/fxemoji)",
    ),
    Package(
        "@iconify-json/noto",
        "1.2.9",
        "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        "Apache-2.0",
        "Noto Emoji, Google Inc. (github.com/googlefonts/noto-emoji)",
    ),
    Package(
        "@iconify-json/noto-v1",
        "1.2.5",
        "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        "Apache-2.0",
        "Noto Emoji, first drawings, Google Inc. (github.com/googlefonts/noto-emoji)",
    ),
)

NOTICE_HEAD = """\
The pocket data is made of drawings and words from the packages below. They are fetched at first use and are no part of
Hardpair's repository. Changes: each drawing was rendered to a small WebP or JPEG picture on white; names and keywords
were joined into captions. Pictures made from CC-BY-SA-4.0 drawings stay under that licence when they are passed on.
"""


def notice_text(packages: Sequence[Package]) -> str:
    """Credits and licences of `packages`, to lie beside the pictures made from them."""
    entries = [f"{p.name} {p.version}\n  {p.credit}\n  Licence: {p.licence}\n" for p in packages]
    return "\n".join([NOTICE_HEAD, *entries])
