//! Giving memory back.

#![allow(unsafe_code, reason = "malloc_trim(3)")]

/// Gives free memory back to the kernel, where the allocator can.
pub(crate) fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
