//! Images that are deleted or cut short while a VM uses them. Nothing on the way of a request looks for that: it shows in a read that
//! fails, and in the end.

use std::fs::File;
use std::path::Path;

use rustix::fs::SeekFrom;

/// After a read that failed: whether the file, which should reach up to `bytes`, ends before. Says so if it does. The caller lets
/// everything that could look like success fail from then on: data that was safe has been lost.
pub fn cut_short(file: &File, path: &Path, bytes: u64) -> bool {
    // Nothing reads or writes at the file's own position.
    let Ok(now) = rustix::fs::seek(file, SeekFrom::End(0)) else {
        return false;
    };
    if now < bytes {
        log::error!(
            "`{}` has been cut short while it is in use: {now} bytes are left of {bytes}; the guest gets I/O errors, and every flush fails from now on; stop the VM and restore the image",
            path.display()
        );
    }
    now < bytes
}

/// When an image that had a name is closed: says so if that is gone, and the contents with it.
pub fn tell_if_deleted(file: &File, path: &Path) {
    if rustix::fs::fstat(file).is_ok_and(|stat| stat.st_nlink == 0) {
        log::error!(
            "`{}` was deleted while it was in use: what the guest has written is gone with it",
            path.display()
        );
    }
}
