use super::*;
use std::sync::Arc;

fn file(length: usize) -> RawFd {
    // SAFETY: a new file with a constant name.
    let fd = unsafe { libc::memfd_create(c"ioreq".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: our descriptor.
    assert_eq!(unsafe { libc::ftruncate(fd, length as i64) }, 0);
    fd
}

fn event() -> RawFd {
    // SAFETY: a new descriptor.
    unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) }
}

fn pair() -> (Arc<Pages>, Arc<Pages>) {
    let fd = file(DATA + 0x1000);
    let one = Arc::new(Pages::map(fd, DATA + 0x1000, 2).unwrap());
    let other = Arc::new(Pages::map(fd, DATA + 0x1000, 2).unwrap());
    (one, other)
}

const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_request_goes_through_xens_states() {
    let (hypervisor, model) = pair();
    let request = Request { addr: 0x1f7, data: 5, count: 1, size: 1, flags: 0x20, kind: 0 };
    assert_eq!(hypervisor.slot_state(1), NONE);
    hypervisor.submit(1, &request);
    assert_eq!(model.slot_state(1), READY);
    assert_eq!(model.next(-1, -1, Some(SOON)), Next::Request(1, request));
    assert_eq!(hypervisor.slot_state(1), IN_PROCESS);
    model.respond(1, 0x50);
    assert_eq!(hypervisor.slot_state(1), RESPONSE);
    assert_eq!(hypervisor.reply(1, -1, -1, SOON), Reply::Data(0x50));
    assert_eq!(model.slot_state(1), NONE);
}

#[test]
fn the_layout_is_xens() {
    let fd = file(DATA);
    let pages = Pages::map(fd, DATA, 2).unwrap();
    pages.submit(
        1,
        &Request {
            addr: 0x1122334455667788,
            data: 0x99aabbccddeeff00,
            count: 3,
            size: 4,
            flags: 0x10,
            kind: 1,
        },
    );
    pages.post(&[Posted { kind: 1, size: 1, addr: 0xabcde, data: 0x1234 }]);
    let mut bytes = [0u8; 0x2000];
    // SAFETY: as many bytes as there is room.
    assert_eq!(unsafe { libc::pread(fd, bytes.as_mut_ptr().cast(), bytes.len(), 0) }, 0x2000);
    let slot = &bytes[32..64];
    assert_eq!(slot[..8], 0x1122334455667788u64.to_le_bytes());
    assert_eq!(slot[8..16], 0x99aabbccddeeff00u64.to_le_bytes());
    assert_eq!((slot[16], slot[20], slot[30], slot[31]), (3, 4, 0x11, 1));
    assert_eq!(bytes[0x1000..0x1008], [0, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(bytes[0x1008..0x1010], [1, 0xe4, 0xcd, 0xab, 0x34, 0x12, 0, 0]);
}

#[test]
fn posted_writes_come_in_order_and_before_the_request_that_follows() {
    let (hypervisor, model) = pair();
    let write = |value| Posted { kind: 1, size: 0, addr: 0xa0000 + value, data: value };
    let mut sent = 0;
    for round in 0..20 {
        for value in 0..90 {
            assert!(hypervisor.post(&[write(round * 90 + value)]).is_some());
        }
        hypervisor.submit(0, &Request { size: 1, count: 1, ..Default::default() });
        let Next::Writes(found) = model.next(-1, -1, Some(SOON)) else { panic!("no writes") };
        assert_eq!(found, (sent..sent + 90).map(write).collect::<Vec<_>>());
        model.finish_writes(90);
        sent += 90;
        assert!(matches!(model.next(-1, -1, Some(SOON)), Next::Request(0, _)));
        model.respond(0, 0);
        assert!(matches!(hypervisor.reply(0, -1, -1, SOON), Reply::Data(0)));
    }
}

#[test]
fn the_ring_of_posted_writes_fills_up() {
    let (hypervisor, model) = pair();
    let write = Posted { kind: 1, size: 0, addr: 0xa0000, data: 0 };
    for _ in 0..BUFFER_SLOTS {
        assert!(hypervisor.post(&[write]).is_some());
    }
    assert_eq!(hypervisor.post(&[write]), None);
    assert_eq!(hypervisor.posted(), BUFFER_SLOTS);
    model.finish_writes(BUFFER_SLOTS);
    assert_eq!(hypervisor.posted(), 0);
    assert!(hypervisor.post(&[write, write]).is_some());
}

#[test]
fn indices_that_make_no_sense_do_no_harm() {
    let (hypervisor, model) = pair();
    hypervisor.word(BUFFERED).store(77, Ordering::Relaxed); // read 77, write 0
    assert_eq!(hypervisor.post(&[Posted { kind: 1, size: 0, addr: 0, data: 0 }]), None);
    assert_eq!(model.posted_writes().len(), BUFFER_SLOTS as usize);
    model.word(CONTROL + OPS_WRITE).store(0xffff_0000, Ordering::Relaxed);
    assert!(hypervisor.operation().is_some());
}

#[test]
fn operations_come_before_the_reply_and_have_a_status() {
    let (hypervisor, model) = pair();
    let event = event();
    let worker = {
        let model = model.clone();
        std::thread::spawn(move || {
            let Next::Request(vcpu, _) = model.next(event, -1, Some(SOON)) else { panic!("no request") };
            let first =
                model.push(&Operation { op: 7, args: [1, 2, 3, 4, 5], ..Default::default() }).unwrap();
            let status = model.status(first, event, -1).unwrap();
            model.push(&Operation { op: 8, ..Default::default() }).unwrap();
            model.respond(vcpu, status as u64);
        })
    };
    let caller = super::tests::event();
    if hypervisor.submit(0, &Request { size: 1, count: 1, ..Default::default() }) {
        ring(event);
    }
    let mut seen = Vec::new();
    let data = loop {
        match hypervisor.reply(0, caller, -1, Duration::from_millis(20)) {
            Reply::Data(data) => break data,
            Reply::Operations => {
                let operation = hypervisor.operation().unwrap();
                seen.push((operation.op, operation.args[4]));
                if hypervisor.finish_operation(-22) {
                    ring(event);
                }
            }
            Reply::Late => {}
            Reply::Lost => panic!("lost"),
        }
    };
    worker.join().unwrap();
    assert_eq!(seen, [(7, 5), (8, 0)]);
    assert_eq!(data as i64, -22);
}

#[test]
fn too_many_operations_wait() {
    let (_, model) = pair();
    for index in 0..OPS_SLOTS {
        assert_eq!(model.push(&Operation::default()), Some(index));
    }
    assert_eq!(model.push(&Operation::default()), None);
}

#[test]
fn a_model_that_has_gone_is_noticed_and_one_that_is_slow_too() {
    let (hypervisor, _) = pair();
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()) }, 0);
    hypervisor.submit(0, &Request::default());
    let event = event();
    assert_eq!(hypervisor.reply(0, event, ends[0], Duration::from_millis(5)), Reply::Late);
    // SAFETY: our descriptor, used no more.
    unsafe { libc::close(ends[1]) };
    assert_eq!(hypervisor.reply(0, event, ends[0], SOON), Reply::Lost);
}

#[test]
fn a_request_that_was_begun_is_begun_again() {
    let (hypervisor, model) = pair();
    let request = Request { addr: 1, size: 1, count: 1, ..Default::default() };
    hypervisor.submit(0, &request);
    assert!(matches!(model.next(-1, -1, Some(SOON)), Next::Request(..)));
    model.restart();
    assert_eq!(model.next(-1, -1, Some(SOON)), Next::Request(0, request));
}

#[test]
fn nobody_is_lost_in_many_round_trips() {
    let (hypervisor, model) = pair();
    let (asked, replied) = (event(), event());
    let rounds = 20_000u64;
    let worker = std::thread::spawn(move || {
        for _ in 0..rounds {
            let Next::Request(vcpu, request) = model.next(asked, -1, Some(SOON)) else { panic!("nothing") };
            if model.respond(vcpu, request.addr + 1) {
                ring(replied);
            }
        }
    });
    for round in 0..rounds {
        if hypervisor.submit(0, &Request { addr: round, ..Default::default() }) {
            ring(asked);
        }
        assert_eq!(hypervisor.reply(0, replied, -1, SOON), Reply::Data(round + 1));
    }
    worker.join().unwrap();
}
