//! Join tokens: `SWMTKN-1-<SHA-256 of the root certificate, 50 base-36 digits>-<secret, 25 base-36 digits>`.
