//! Where io_uring is refused, as in many containers, the engine starts all the same.

use driveline_engine::{Backend, Config, Engine};

/// Makes the kernel refuse `io_uring_setup` to this thread and those that it starts.
fn refuse_io_uring() {
    const fn statement(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code: code as u16, jt, jf, k }
    }
    let number = libc::SYS_io_uring_setup as u32;
    let filter = [
        // The number of the system call is the first word of what the filter sees.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: no memory is passed.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    // SAFETY: the program and its filter outlive the call.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) };
    assert_eq!(result, 0);
}

#[test]
fn the_environment_and_the_kernel_choose_the_backend() {
    let start = |backend| Engine::start(Config { threads: 2, backend, ..Config::default() });
    let set = |value: Option<&str>| match value {
        // SAFETY: this program has one test, and the engines of the test are gone: nobody else reads the environment.
        Some(value) => unsafe { std::env::set_var("DRIVELINE_ENGINE", value) },
        // SAFETY: as above.
        None => unsafe { std::env::remove_var("DRIVELINE_ENGINE") },
    };
    set(Some("epoll"));
    assert_eq!(start(Backend::Auto).unwrap().backend(), Backend::Fallback);
    assert_eq!(start(Backend::IoUring).unwrap().backend(), Backend::IoUring, "asked for by name");
    set(Some("io_uring"));
    assert_eq!(start(Backend::Auto).unwrap().backend(), Backend::IoUring);
    set(Some("kqueue"));
    assert!(start(Backend::Auto).unwrap_err().to_string().contains("kqueue"));
    set(None);
    assert_eq!(start(Backend::Auto).unwrap().backend(), Backend::IoUring);
    std::thread::spawn(move || {
        refuse_io_uring();
        assert_eq!(start(Backend::IoUring).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
        let engine = start(Backend::Auto).unwrap();
        assert_eq!(engine.backend(), Backend::Fallback);
        assert_eq!(engine.block_on(driveline_engine::unblock(|| 7)), 7);
    })
    .join()
    .unwrap();
}
