import static org.assertj.core.api.Assertions.assertThat;
import static org.assertj.core.api.Assertions.assertThatThrownBy;

import java.io.*;
import java.nio.charset.StandardCharsets;
import java.util.*;
import java.util.regex.*;
import java.util.stream.Stream;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.*;

/**
 * What the hook reads from the tables of net-tools, BusyBox, ss and procfs, and what it refuses to take for one.
 *
 * <p>The tables are what net-tools 2.10, BusyBox 1.35, iproute2 6.1 and Linux 6.18 printed, all four of the same
 * sockets in a network namespace of their own. The peers' ends were played by a program on a TUN device, so that the
 * sockets stay in states that otherwise pass in no time. Left out are the blanks at the ends of lines, and the columns
 * of procfs behind those of the queues. The watched port is 1234, the socket buildkitd.sock.
 */
class ParserTest {

    // ---- The same sockets, as each source shows them ---------------------------------------------------------------

    private static final String NET_TOOLS = """
            Active Internet connections (servers and established)
            Proto Recv-Q Send-Q Local Address           Foreign Address         State
            tcp        0      0 192.0.2.10:1234         0.0.0.0:*               LISTEN
            tcp        0      1 192.0.2.10:44522        203.0.113.9:1234        SYN_SENT
            tcp        1      1 192.0.2.10:1234         198.51.100.7:41239      CLOSING
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41233      SYN_RECV
            tcp        1      1 192.0.2.10:1234         198.51.100.7:41238      LAST_ACK
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41235      FIN_WAIT2
            tcp        0      0 192.0.2.10:1234         198.51.100.7:1234       ESTABLISHED
            tcp        1      0 192.0.2.10:1234         198.51.100.7:41237      CLOSE_WAIT
            tcp       77    300 192.0.2.10:1234         198.51.100.7:12345      ESTABLISHED
            tcp        0      1 192.0.2.10:1234         198.51.100.7:41234      FIN_WAIT1
            tcp        0      0 192.0.2.10:234          203.0.113.9:1234        ESTABLISHED
            tcp        0      0 192.0.2.10:12345        203.0.113.9:1234        ESTABLISHED
            tcp        0      0 192.0.2.10:1234         198.51.100.7:41236      TIME_WAIT
            tcp        0      0 192.0.2.10:41234        203.0.113.9:1234        ESTABLISHED
            tcp6       0      0 :::1234                 :::*                    LISTEN
            tcp6       0      0 192.0.2.11:1234         198.51.100.7:41234      ESTABLISHED
            tcp6       0      0 2001:db8::10:1234       2001:db8:1:0:1:::50007  ESTABLISHED
            tcp6       0      0 2001:db8::10:1234       2001:db8:1:1234:5:51234 ESTABLISHED
            tcp6       0      0 2001:db8::1234:41234    2001:db8::1:1234:1234   ESTABLISHED
            tcp6       0      0 2001:db8::10:1234       2001:db8:1::1234:12340  ESTABLISHED
            tcp6       0      0 fe80::1:1234            fe80::7:45678           ESTABLISHED
            Active UNIX domain sockets (servers and established)
            Proto RefCnt Flags       Type       State         I-Node   Path
            unix  2      [ ACC ]     STREAM     LISTENING     8595484  /run/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     8595487  /run/my
            unix  3      [ ]         DGRAM      CONNECTED     8595490  /run/dgram/buildkitd.sock
            unix  2      [ ]         DGRAM                    8595492  /run/log/buildkitd.sock
            unix  2      [ ACC ]     SEQPACKET  LISTENING     8595493  /run/seq/buildkitd.sock
            unix  3      [ ]         SEQPACKET  CONNECTED     8595494  /run/q/buildkitd.sock
            unix  3      [ ]         SEQPACKET  CONNECTED     8595495
            unix  2      [ ]         STREAM                   8595496  /run/idle/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     8595486  /run/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     8595488  /run/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTING    0        /run/buildkitd.sock
            unix  3      [ ]         STREAM     CONNECTED     8595489
            unix  3      [ ]         DGRAM      CONNECTED     8595491
            unix  3      [ ]         STREAM     CONNECTED     8595485  @buildkitd.sock
            """;

    /** What BusyBox printed: it cuts nothing off, and writes IPv4 in another way where the listener is IPv6's. */
    private static final String BUSYBOX = NET_TOOLS.replace("tcp6 ", "tcp  ")
            .replace("192.0.2.11:1234         198.51.100.7:41234     ",
                    "::ffff:192.0.2.11:1234  ::ffff:198.51.100.7:41234")
            .replace("2001:db8:1:1234:5:51234", "2001:db8:1:1234:5:6:7:8:51234")
            .replace("/run/my", "/run/my buildkitd.sock").replace("    0        /run", "         0 /run")
            .replaceAll("(\\d{7}|I-Node)  +", "$1 ");

    private static final String SS = """
            Netid State      Recv-Q Send-Q             Local Address:Port                 Peer Address:Port   Process
            u_str LISTEN     1      5            /run/buildkitd.sock 8595484                         * 0
            u_str ESTAB      0      0         /run/my buildkitd.sock 8595487                         * 8595488
            u_dgr ESTAB      0      0      /run/dgram/buildkitd.sock 8595490                         * 8595491
            u_dgr UNCONN     0      0        /run/log/buildkitd.sock 8595492                         * 0
            u_seq LISTEN     0      5        /run/seq/buildkitd.sock 8595493                         * 0
            u_seq ESTAB      0      0          /run/q/buildkitd.sock 8595494                         * 8595495
            u_seq ESTAB      0      0                              * 8595495                         * 8595494
            u_str UNCONN     0      0       /run/idle/buildkitd.sock 8595496                         * 0
            u_str ESTAB      0      0            /run/buildkitd.sock 8595486                         * 8595485
            u_str ESTAB      0      0            /run/buildkitd.sock 8595488                         * 8595487
            u_str ESTAB      0      0                              * 8595489                         * 0
            u_dgr ESTAB      0      0                              * 8595491                         * 8595490
            u_str ESTAB      0      0                @buildkitd.sock 8595485                         * 8595486
            tcp   LISTEN     0      64                    192.0.2.10:1234                      0.0.0.0:*
            tcp   SYN-SENT   0      1                     192.0.2.10:44522                 203.0.113.9:1234
            tcp   CLOSING    1      1                     192.0.2.10:1234                 198.51.100.7:41239
            tcp   SYN-RECV   0      0                     192.0.2.10:1234                 198.51.100.7:41233
            tcp   LAST-ACK   1      1                     192.0.2.10:1234                 198.51.100.7:41238
            tcp   FIN-WAIT-2 0      0                     192.0.2.10:1234                 198.51.100.7:41235
            tcp   ESTAB      0      0                     192.0.2.10:1234                 198.51.100.7:1234
            tcp   CLOSE-WAIT 1      0                     192.0.2.10:1234                 198.51.100.7:41237
            tcp   ESTAB      77     300                   192.0.2.10:1234                 198.51.100.7:12345
            tcp   FIN-WAIT-1 0      1                     192.0.2.10:1234                 198.51.100.7:41234
            tcp   ESTAB      0      0                     192.0.2.10:234                   203.0.113.9:1234
            tcp   ESTAB      0      0                     192.0.2.10:12345                 203.0.113.9:1234
            tcp   TIME-WAIT  0      0                     192.0.2.10:1234                 198.51.100.7:41236
            tcp   ESTAB      0      0                     192.0.2.10:41234                 203.0.113.9:1234
            tcp   LISTEN     0      64                             *:1234                            *:*
            tcp   ESTAB      0      0            [::ffff:192.0.2.11]:1234        [::ffff:198.51.100.7]:41234
            tcp   ESTAB      0      0                 [2001:db8::10]:1234           [2001:db8:1:0:1::]:50007
            tcp   ESTAB      0      0                 [2001:db8::10]:1234    [2001:db8:1:1234:5:6:7:8]:51234
            tcp   ESTAB      0      0               [2001:db8::1234]:41234          [2001:db8::1:1234]:1234
            tcp   ESTAB      0      0                 [2001:db8::10]:1234           [2001:db8:1::1234]:12340
            tcp   ESTAB      0      0                 [fe80::1]%eth0:1234                    [fe80::7]:45678
            """;

    private static final String TCP = """
              sl  local_address rem_address   st tx_queue rx_queue
               0: 0A0200C0:04D2 00000000:0000 0A 00000000:00000000
               1: 0A0200C0:ADEA 097100CB:04D2 02 00000001:00000000
               2: 0A0200C0:04D2 076433C6:A117 0B 00000001:00000001
               3: 0A0200C0:04D2 076433C6:A111 03 00000000:00000000
               4: 0A0200C0:04D2 076433C6:A116 09 00000001:00000001
               5: 0A0200C0:04D2 076433C6:A113 05 00000000:00000000
               6: 0A0200C0:04D2 076433C6:04D2 01 00000000:00000000
               7: 0A0200C0:04D2 076433C6:A115 08 00000000:00000001
               8: 0A0200C0:04D2 076433C6:3039 01 0000012C:0000004D
               9: 0A0200C0:04D2 076433C6:A112 04 00000001:00000000
              10: 0A0200C0:00EA 097100CB:04D2 01 00000000:00000000
              11: 0A0200C0:3039 097100CB:04D2 01 00000000:00000000
              12: 0A0200C0:04D2 076433C6:A114 06 00000000:00000000
              13: 0A0200C0:A112 097100CB:04D2 01 00000000:00000000
            """;

    private static final String TCP6 = """
              sl  local_address                         remote_address                        st tx_queue rx_queue
               0: 00000000000000000000000000000000:04D2 00000000000000000000000000000000:0000 0A 00000000:00000000
               1: 0000000000000000FFFF00000B0200C0:04D2 0000000000000000FFFF0000076433C6:A112 01 00000000:00000000
               2: B80D0120000000000000000010000000:04D2 B80D0120000001000000010000000000:C357 01 00000000:00000000
               3: B80D0120000000000000000010000000:04D2 B80D0120341201000600050008000700:C822 01 00000000:00000000
               4: B80D0120000000000000000034120000:A112 B80D0120000000000000000034120100:04D2 01 00000000:00000000
               5: B80D0120000000000000000010000000:04D2 B80D0120000001000000000034120000:3034 01 00000000:00000000
               6: 000080FE000000000000000001000000:04D2 000080FE000000000000000007000000:B26E 01 00000000:00000000
            """;

    private static final String UNIX = """
            Num       RefCount Protocol Flags    Type St Inode Path
            000000000a6e1ede: 00000002 00000000 00010000 0001 01 8595484 /run/buildkitd.sock
            000000001100c409: 00000003 00000000 00000000 0001 03 8595487 /run/my buildkitd.sock
            00000000c3f17200: 00000003 00000000 00000000 0002 03 8595490 /run/dgram/buildkitd.sock
            000000007963c725: 00000002 00000000 00000000 0002 01 8595492 /run/log/buildkitd.sock
            00000000c74797e6: 00000002 00000000 00010000 0005 01 8595493 /run/seq/buildkitd.sock
            00000000eefd4257: 00000003 00000000 00000000 0005 03 8595494 /run/q/buildkitd.sock
            00000000bfbc577c: 00000003 00000000 00000000 0005 03 8595495
            00000000a8e90c24: 00000002 00000000 00000000 0001 01 8595496 /run/idle/buildkitd.sock
            000000009ab53b4e: 00000003 00000000 00000000 0001 03 8595486 /run/buildkitd.sock
            000000001a713c6d: 00000003 00000000 00000000 0001 03 8595488 /run/buildkitd.sock
            00000000b2430fdf: 00000003 00000000 00000000 0001 02     0 /run/buildkitd.sock
            00000000bfda2d5b: 00000003 00000000 00000000 0001 03 8595489
            0000000031172244: 00000003 00000000 00000000 0002 03 8595491
            00000000a23e9506: 00000003 00000000 00000000 0001 03 8595485 @buildkitd.sock
            """;

    enum Printed {
        netTools(Source.netstat, NET_TOOLS), busyBox(Source.netstat, BUSYBOX), ss(Source.ss, SS),
        procfs(Source.procfs, TCP, TCP6, UNIX);

        private final Source source;
        private final List<String> texts;

        Printed(Source source, String... texts) {
            this.source = source;
            this.texts = List.of(texts);
        }

        /** What they tell of buildkitd. */
        Seen ofBuildkitd() {
            return new Seen(List.of("198.51.100.7:1234", "198.51.100.7:12345", "198.51.100.7:41234",
                    "[2001:db8:1:0:1::]:50007",
                    this == netTools ? "[2001:db8:1:1234:5]:51234" : "[2001:db8:1:1234:5:6:7:8]:51234", // cut off
                    "[2001:db8:1::1234]:12340", "[fe80::7]:45678"), 2, 2, 1);
        }
    }

    /** The peers named, and the numbers of unix connections and of listeners. */
    record Seen(List<String> peers, int unix, int portListeners, int socketListeners) { }

    // ---- Tables that are read --------------------------------------------------------------------------------------

    /** However many bytes a read gives at once. */
    @ParameterizedTest
    @EnumSource
    void countsAndNamesTheConnectionsOfBuildkitdAndNothingElse(Printed printed) throws IOException {
        for (int most : List.of(1, 7, Integer.MAX_VALUE)) {
            assertThat(see(printed.source, printed.texts, most)).isEqualTo(printed.ofBuildkitd());
        }
    }

    @ParameterizedTest
    @EnumSource
    void countsARowThatTheKernelShowsAgainOnce(Printed printed) throws IOException {
        List<String> twice = Stream.concat(printed.texts.stream(), printed.texts.stream()).toList();
        assertThat(see(printed.source, twice, 7)).isEqualTo(printed.ofBuildkitd());
    }

    @ParameterizedTest
    @EnumSource
    void understandsLinesThatEndWithBlanksOrACarriageReturn(Printed printed) throws IOException {
        for (String end : List.of("      \n", "\r\n")) {
            List<String> texts = printed.texts.stream().map(text -> text.replace("\n", end)).toList();
            assertThat(see(printed.source, texts, 7)).isEqualTo(printed.ofBuildkitd());
        }
    }

    @ParameterizedTest
    @ValueSource(strings = {"Port", "PortProcess"})
    void understandsTheHeadingOfAnotherVersionOfSs(String end) {
        String heading = "Netid State Recv-Q Send-Q Local Address:Port Peer Address:" + end + "\n";
        assertThat(isRead(Source.ss, heading)).isTrue();
    }

    /** States of TCP that no table above shows of the watched port, and of unix sockets that none shows at all. */
    @ParameterizedTest
    @CsvSource({"netstat, SYN_SENT", "netstat, CLOSE", "ss, SYN-SENT", "ss, UNCONN", "procfs, 02", "procfs, 07",
        "netstat, STREAM FREE", "netstat, STREAM DISCONNECTING", "netstat, RAW CONNECTED", "netstat, RDM CONNECTED",
        "ss, u_str SYN-SENT", "ss, u_str CLOSING", "procfs, 00000000 0001 00", "procfs, 00000000 0001 04",
        "procfs, 00000000 0003 03", "procfs, 00000000 0004 03"})
    void countsNoRareStateEither(Source source, String state) throws IOException {
        assertThat(see(source, List.of(table(source, row(source, state))), 7)).isEqualTo(new Seen(List.of(), 0, 0, 0));
    }

    /** States that there are not: in another language, cut off, of another kernel. */
    @ParameterizedTest
    @CsvSource({"netstat, VERBUNDEN", "netstat, ESTABLISHE", "netstat, ESTABLISHEDX", "netstat, STREAM VERBUNDEN",
        "ss, ESTABLISHED", "ss, ESTA", "ss, u_str ESTABLISHED", "ss, u_str ESTA", "ss, u_xdp ESTAB", "procfs, 00",
        "procfs, 0C", "procfs, 1", "procfs, 011", "procfs, 00000000 0001 05", "procfs, 00000000 0006 03"})
    void refusesOnlyOfBuildkitdAStateThatThereIsNot(Source source, String state) {
        String row = row(source, state);
        assertThat(isRead(source, table(source, row))).isFalse();
        String other = row.replace(":1234", ":9").replace(":04D2", ":0009").replace("/buildkitd", "/other");
        assertThat(isRead(source, table(source, other))).isTrue();
    }

    @ParameterizedTest
    @CsvSource({
        "buildkitd.sock, /run/buildkit/buildkitd.sock, 1", "buildkitd.sock, buildkitd.sock, 1",
        "buildkitd.sock, /run/xbuildkitd.sock, 0", "buildkitd.sock, /run/buildkitd.sockx, 0",
        "buildkitd.sock, /run/my own/buildkitd.sock, 1", "buildkitd.sock, /run/buildkitdXsock, 0",
        "buildkit/buildkitd.sock, /run/buildkit/buildkitd.sock, 1", "/run/b.sock, /run/b.sock, 1",
        "/run/b.sock, /var/run/b.sock, 0", "@b.sock, @b.sock, 1", "b 7 * 7.sock, /run/b 7 * 7.sock, 1",
        "\u00e9.sock, /run/\u00e9.sock, 1", "\ufffd\ufffd.sock, /run/\u00e9.sock, 1", "\u00e9.sock, /run/e.sock, 0",
        "buildkitd.sock, /run/\u00c5/buildkitd.sock, 1"}) // whose second byte in UTF-8 ends a line in Latin-1
    void aSocketIsAPathOrTheEndOfOne(String socket, String path, int count) throws IOException {
        Map<Source, String> connected = Map.of(Source.netstat, "STREAM CONNECTED", Source.ss, "u_str ESTAB",
                Source.procfs, "00000000 0001 03");
        for (Source source : Source.values()) {
            Look look = look(source, socket);
            read(look, table(source, row(source, connected.get(source)).replace("/run/buildkitd.sock", path)), 7);
            assertThat(look.count()).as(source.name()).isEqualTo(count);
        }
    }

    // ---- What is refused -------------------------------------------------------------------------------------------

    @ParameterizedTest
    @EnumSource
    void refusesATableThatIsCutOffAnywhereButBehindARow(Printed printed) {
        for (String text : printed.texts) {
            for (int end = 0; end <= text.length(); end++) {
                String start = text.substring(0, end);
                boolean whole = start.endsWith("\n") && headings(start).equals(headings(text));
                assertThat(isRead(printed.source, start)).as(start).isEqualTo(whole);
            }
        }
    }

    @ParameterizedTest
    @EnumSource
    void refusesATableThatLacksAHeading(Printed printed) {
        for (String text : printed.texts) {
            headings(text).lines().forEach(heading ->
                    assertThat(isRead(printed.source, text.replace(heading + "\n", ""))).as(heading).isFalse());
        }
    }

    @ParameterizedTest
    @EnumSource
    void refusesATableWithALineThatIsNoRow(Printed printed) {
        List<String> oddLines = new ArrayList<>(List.of("", "killed", "\u007fELF\2\1\1\0\0\376\377",
                "u_str ESTAB 0 0 /run/buildkitd.sock 77 /run/client 78", // what is the path in such a row?
                "0: 0A0200C0:04D2 00000A0700000A07:A112 01 0")); // no address is so long
        oddLines.addAll(headings(String.join("", printed.texts)).lines().toList());
        Stream.of(Printed.values()).filter(other -> other.source != printed.source)
                .forEach(other -> other.texts.forEach(text -> oddLines.addAll(text.lines().toList())));
        for (String text : printed.texts) {
            for (int i = 0; i <= text.lines().count(); i++) {
                for (String oddLine : oddLines) {
                    List<String> lines = new ArrayList<>(text.lines().toList());
                    lines.add(i, oddLine);
                    assertThat(isRead(printed.source, String.join("\n", lines) + "\n")).as(oddLine).isFalse();
                }
            }
        }
    }

    @ParameterizedTest
    @CsvSource({"netstat, tcp 0 0 192.0.2.10:9 192.0.2.7:41234 LISTEN", "netstat, unix 3 [ ] DGRAM 77",
        "ss, tcp LISTEN 0 0 192.0.2.10:9 192.0.2.7:41234", "ss, u_dgr ESTAB 0 0 /run/log 77 * 78",
        "procfs, 0: 0A0200C0:0009 070200C0:A112 01 0", "procfs, 0: 00000003 00000000 00000000 0002 03 77"})
    void refusesARowThatLacksAWordOrAColonThoughItIsNotOfBuildkitd(Source source, String row) {
        assertThat(isRead(source, table(source, row))).isTrue();
        for (Matcher part = Pattern.compile("[^ :]+|:").matcher(row); part.find(); ) {
            String rest = row.substring(0, part.start()) + row.substring(part.end());
            assertThat(isRead(source, table(source, rest))).as(rest).isFalse();
        }
    }

    @Test
    void refusesALineThatDoesNotEndBeforeItIsLong() {
        int[] reads = {0};
        assertThatThrownBy(() -> look(Source.ss, "buildkitd.sock").read(buffer -> {
            assertThat(++reads[0]).isLessThan(10);
            Arrays.fill(buffer, (byte) 'x');
            return buffer.length;
        }, Source.ss.headings)).isInstanceOf(IOException.class).hasMessageContaining("not a socket table: xxx");
    }

    // ---- Helpers ---------------------------------------------------------------------------------------------------

    /** The headings among the lines. */
    private static String headings(String text) {
        return text.replaceAll("(?m)^(tcp|unix|u_| *\\w+: ).*\n", "");
    }

    /** The headings, and this row. */
    private static String table(Source source, String row) {
        return headings(Map.of(Source.netstat, NET_TOOLS, Source.ss, SS, Source.procfs, TCP).get(source)) + row + "\n";
    }

    /** A row of buildkitd, of TCP or, where the state has several words, of its unix socket. */
    private static String row(Source source, String state) {
        return (switch (source) {
            case netstat -> state.contains(" ") ? "unix 3 [ W ACC N ] %s 77 /run/buildkitd.sock"
                    : "tcp 0 0 192.0.2.10:1234 192.0.2.7:41234 %s";
            case ss -> state.contains(" ") ? "%s 0 0 /run/buildkitd.sock 77 * 78"
                    : "tcp %s 0 0 192.0.2.10:1234 192.0.2.7:41234";
            case procfs -> state.contains(" ") ? "0: 00000003 00000000 %s 77 /run/buildkitd.sock"
                    : "0: 0A0200C0:04D2 070200C0:A112 %s 0";
        }).formatted(state);
    }

    /** Reads the texts one after the other, at most so many bytes at once. */
    private static Seen see(Source source, List<String> texts, int most) throws IOException {
        Look look = look(source, "buildkitd.sock");
        for (String text : texts) {
            read(look, text, most);
        }
        List<String> peers = new ArrayList<>();
        for (String ends : look.tcp()) {
            peers.add(source.peerOf(ends));
        }
        return new Seen(peers, look.unix().size(), look.tcpListeners().size(), look.unixListeners().size());
    }

    private static boolean isRead(Source source, String text) {
        try {
            read(look(source, "buildkitd.sock"), text, Integer.MAX_VALUE);
            return true;
        } catch (IOException refused) {
            return false;
        }
    }

    private static Look look(Source source, String socket) {
        BuildkitPrestop settings = new BuildkitPrestop();
        settings.port = 1234;
        settings.socket = socket;
        settings.source = BuildkitPrestop.ConnectionSource.auto;
        return new Sockets(settings).newLook(source);
    }

    private static void read(Look look, String text, int most) throws IOException {
        List<Pattern> headings = look.source().headings;
        if (look.source() == Source.procfs) {
            headings = text.startsWith("Num") ? headings.subList(1, 2) : headings.subList(0, 1);
        }
        // The kernel and the tools write a path's bytes as they are.
        ByteArrayInputStream in = new ByteArrayInputStream(text.getBytes(StandardCharsets.UTF_8));
        look.read(buffer -> in.read(buffer, 0, Math.min(buffer.length, most)), headings);
    }
}
