//! Versions and limits that both sides know.

/// The newest version of the Docker Engine API that the daemon speaks.
pub const API_VERSION: (u32, u32) = (1, 51);
/// The oldest. Clients whose first ping failed fall back to it and stay there.
pub const MIN_API_VERSION: (u32, u32) = (1, 24);
/// Request bodies larger than this are refused with 413 before they are parsed.
pub const BODY_BYTES_MAX: usize = 4 << 20;
/// Where the daemon listens unless it is told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/mesh/mesh.sock";
